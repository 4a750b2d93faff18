// What the norms and quantizers share: groups of eight neighbouring values of a row, channel vectors, codes, and sums
// and maxima over a block.
//
// A thread takes GROUP values at a time, the next group of a row belongs to the next thread. Where every row and vector
// begins at a multiple of 16 bytes (MQ_ALIGNED; the host looks) groups are read and written by 16-byte accesses, else
// value by value, up to the end of the row.
//
// All arithmetic is float32 in the order of the torch references, each operation rounded by itself: `__fmul_rn` and
// `__fadd_rn` keep the compiler from making a fused multiply-add of them, which would move codes across ties.
#pragma once
#include "epilogue.cuh"

constexpr int THREADS = MQ_THREADS;    // of a block, a multiple of 32
constexpr bool ALIGNED = MQ_ALIGNED;
constexpr int BITS = MQ_BITS;          // of a code; 0: floats are written
constexpr bool PACKED = MQ_PACKED;     // two codes in a byte, the even column in the low nibble
constexpr int INPUT = MQ_INPUT;        // element kinds, as below
constexpr int OUTPUT = MQ_OUTPUT;      // of floats that are written
constexpr bool GATHERED = MQ_GATHERED; // code c reads channel index[c]
constexpr int MULTIPLIER = MQ_MULTIPLIER, SHIFT = MQ_SHIFT;  // kinds of channel vectors, as below

constexpr int BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2;  // element kinds
constexpr int ABSENT = 0, SHARED = 1, EACH = 2;        // channel vectors: none, one element for all, one for each code

constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;
constexpr int GROUP = 8;
constexpr int STEP = GROUP * THREADS;  // from a thread's group to its next one

// How an element of a kind is stored.
template <int KIND>
struct Stored {
    typedef u16 Type;
};
template <>
struct Stored<FLOAT32> {
    typedef float Type;
};
template <int KIND>
using Element = typename Stored<KIND>::Type;

MQ_DEVICE int first_column() { return GROUP * static_cast<int>(threadIdx.x); }

template <int KIND>
MQ_DEVICE float to_float(Element<KIND> element) {
    if constexpr (KIND == FLOAT32) {
        return element;
    } else {
        return KIND == FLOAT16 ? f16_low(element) : bf16_low(element);
    }
}

// Two floats as 16-bit elements, the first in the low half.
template <int KIND>
MQ_DEVICE u32 pack_pair(float low, float high) {
    return pack_16bit<KIND == FLOAT16>(low, high);
}

// A value as it reads back once it is stored as an element.
template <int KIND>
MQ_DEVICE float rounded(float value) {
    if constexpr (KIND == FLOAT32) {
        return value;
    } else {
        return to_float<KIND>(static_cast<u16>(pack_pair<KIND>(value, 0.0f)));
    }
}

// Eight floats from an aligned address.
MQ_DEVICE void read8(const float* from, float (&value)[GROUP]) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
    value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
}

// Eight 16-bit elements as floats.
template <int KIND>
MQ_DEVICE void unpack_group(const uint4& four, float (&value)[GROUP]) {
    const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        value[2 * j] = KIND == FLOAT16 ? f16_low(words[j]) : bf16_low(words[j]);
        value[2 * j + 1] = KIND == FLOAT16 ? f16_high(words[j]) : bf16_high(words[j]);
    }
}

// The values at column .. column + 7 of a row; beyond its width they are zero.
template <int KIND>
MQ_DEVICE void load_group(const Element<KIND>* row, int column, int width, float (&value)[GROUP]) {
    if (!ALIGNED || column >= width) {
#pragma unroll
        for (int j = 0; j < GROUP; j++) value[j] = column + j < width ? to_float<KIND>(row[column + j]) : 0.0f;
    } else if constexpr (KIND == FLOAT32) {
        read8(row + column, value);
    } else {
        unpack_group<KIND>(*reinterpret_cast<const uint4*>(row + column), value);
    }
}

// Values to column .. column + 7 of a row; beyond its width nothing is written.
template <int KIND>
MQ_DEVICE void store_group(Element<KIND>* row, int column, int width, const float (&value)[GROUP]) {
    if (!ALIGNED) {
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            if (column + j >= width) continue;
            if constexpr (KIND == FLOAT32) {
                row[column + j] = value[j];
            } else {
                row[column + j] = static_cast<u16>(pack_pair<KIND>(value[j], 0.0f));
            }
        }
    } else if (column < width) {
        if constexpr (KIND == FLOAT32) {
            float4* to = reinterpret_cast<float4*>(row + column);
            to[0] = make_float4(value[0], value[1], value[2], value[3]);
            to[1] = make_float4(value[4], value[5], value[6], value[7]);
        } else {
            *reinterpret_cast<uint4*>(row + column) =
                make_uint4(pack_pair<KIND>(value[0], value[1]), pack_pair<KIND>(value[2], value[3]),
                           pack_pair<KIND>(value[4], value[5]), pack_pair<KIND>(value[6], value[7]));
        }
    }
}

// Codes of values, to column .. column + 7 of row `number` of a result of `width` codes a row.
template <int CODE_BITS>
MQ_DEVICE void store_codes(u8* out, u64 number, int column, int width, const float (&value)[GROUP]) {
    i32 code[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; j++) code[j] = code_of<CODE_BITS>(value[j]);
    if constexpr (PACKED) {
        u8* to = out + number * static_cast<u64>(width / 2) + column / 2;
        u32 bytes = 0;
#pragma unroll
        for (int j = 0; j < GROUP; j++) bytes |= static_cast<u32>(code[j] & 15) << (4 * j);
        if (!ALIGNED) {
#pragma unroll
            for (int j = 0; j < GROUP / 2; j++) {
                if (column + 2 * j < width) to[j] = static_cast<u8>(bytes >> (8 * j));
            }
        } else if (column < width) {
            *reinterpret_cast<u32*>(to) = bytes;
        }
    } else {
        u8* to = out + number * static_cast<u64>(width) + column;
        if (!ALIGNED) {
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                if (column + j < width) to[j] = static_cast<u8>(code[j]);
            }
        } else if (column < width) {
            *reinterpret_cast<uint2*>(to) = make_uint2(pack_codes(code[0], code[1], code[2], code[3]),
                                                       pack_codes(code[4], code[5], code[6], code[7]));
        }
    }
}

// Results of a group: codes, or floats where there are no bits.
template <int CODE_BITS>
MQ_DEVICE void store_results(void* out, u64 number, int column, int width, const float (&value)[GROUP]) {
    if constexpr (CODE_BITS > 0) {
        store_codes<CODE_BITS>(static_cast<u8*>(out), number, column, width, value);
    } else {
        Element<OUTPUT>* row = static_cast<Element<OUTPUT>*>(out) + number * static_cast<u64>(width);
        store_group<OUTPUT>(row, column, width, value);
    }
}

// What does not depend on activations, for the codes of a group.
struct Constants {
    float gain[GROUP];
    float offset[GROUP];
    i32 source[GROUP];
};

template <int WHICH, int KIND>
MQ_DEVICE void load_vector(const Element<KIND>* vector, int column, int width, float (&value)[GROUP]) {
    if constexpr (WHICH == EACH) {
        load_group<KIND>(vector, column, width, value);
    } else if constexpr (WHICH == SHARED) {
        const float one = to_float<KIND>(vector[0]);
#pragma unroll
        for (int j = 0; j < GROUP; j++) value[j] = one;
    }
}

template <int KIND>
MQ_DEVICE void load_constants(const Element<KIND>* multiplier, const float* shift, const i32* index, int column,
                              int width, Constants& constants) {
    load_vector<MULTIPLIER, KIND>(multiplier, column, width, constants.gain);
    load_vector<SHIFT, FLOAT32>(shift, column, width, constants.offset);
    if constexpr (GATHERED) {
        if (ALIGNED && column < width) {
            const int4 low = *reinterpret_cast<const int4*>(index + column);
            const int4 high = *reinterpret_cast<const int4*>(index + column + 4);
            constants.source[0] = low.x, constants.source[1] = low.y;
            constants.source[2] = low.z, constants.source[3] = low.w;
            constants.source[4] = high.x, constants.source[5] = high.y;
            constants.source[6] = high.z, constants.source[7] = high.w;
        } else {  // columns beyond the width read channel 0, for nothing
#pragma unroll
            for (int j = 0; j < GROUP; j++) constants.source[j] = column + j < width ? index[column + j] : 0;
        }
    }
}

// value * gain + offset, what there is of them.
MQ_DEVICE void scale_group(const Constants& constants, float (&value)[GROUP]) {
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
        if (MULTIPLIER != ABSENT) value[j] = __fmul_rn(value[j], constants.gain[j]);
        if (SHIFT != ABSENT) value[j] = __fadd_rn(value[j], constants.offset[j]);
    }
}

// The sum, or the maximum, of every thread's value, in every thread; the order of additions is fixed.
template <bool MAXIMUM>
MQ_DEVICE float over_block(float value) {
    __shared__ float parts[WARP];
#pragma unroll
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, value, apart);
        value = MAXIMUM ? fmaxf(value, other) : __fadd_rn(value, other);
    }
    const int lane = threadIdx.x % WARP;
    __syncthreads();  // `parts` may still be read for the last result
    if (lane == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    value = lane < WARPS ? parts[lane] : 0.0f;  // neutral for sums, and for maxima of magnitudes
#pragma unroll
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, value, apart);
        value = MAXIMUM ? fmaxf(value, other) : __fadd_rn(value, other);
    }
    return value;
}
MQ_DEVICE float block_sum(float value) { return over_block<false>(value); }
MQ_DEVICE float block_maximum(float value) { return over_block<true>(value); }
