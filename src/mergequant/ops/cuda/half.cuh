// What the weight-only kernels share: pairs of float16, their tensor core instruction, and the inputs as `arrange.cu`
// leaves them.
//
// Inputs are float16, each token times a power of two that brings its largest value below 2^14, so that no bfloat16
// loses anything that counts. Columns stand in stored order, in chunks of 128, in which a lane t = lane % 4 of every
// group of four meets columns 32 t .. 32 t + 31. Its operands of two mma.sync are 16 bytes: eight neighbouring columns
// in the order 0 4 1 5 2 6 3 7, the one in which nibbles leave a word. Piece j of lane t lies at place 4 j + t.
#pragma once
#include "epilogue.cuh"

constexpr int CHUNK = 128;                                    // columns
constexpr int CHUNK_BYTES = 2 * CHUNK, PIECE_BYTES = 64;      // of a token; of the four lanes' pieces j
constexpr int ROW_PAD = 64;                                   // bytes after a token: neighbours meet different banks
constexpr int SUM_ROW = 20;                                   // words of 16 sums, padded against bank conflicts

struct alignas(8) F2 {
    float x, y;
};

MQ_DEVICE int token_pitch(int width) { return (width + CHUNK - 1) / CHUNK * CHUNK_BYTES + ROW_PAD; }

MQ_DEVICE u32 add_pair(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

MQ_DEVICE u32 subtract_pair(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

MQ_DEVICE u32 multiply_pair(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

MQ_DEVICE u32 multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// word & mask | bits, in one instruction: left to itself the compiler takes two.
MQ_DEVICE u32 select_or(u32 word, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "r"(mask), "r"(bits));
    return d;
}

// The low halves of two words, and the high ones.
MQ_DEVICE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
MQ_DEVICE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// d (16 x 8, float32) += a (16 x 16, float16, rows) * b (16 x 8, float16, columns).  With g = lane / 4 and t = lane % 4:
//   a0: row g, k 2t 2t+1     a1: row g + 8, the same k     a2: row g, k 2t+8 2t+9     a3: row g + 8, the same
//   b0: column g, k 2t 2t+1  b1: column g, k 2t+8 2t+9     d: as of mma_s8
MQ_DEVICE void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

MQ_DEVICE u32 word_of(const U4& four, int j) { return j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w; }

// ---------------------------------------------------------------------------------------------------------------------
// Inputs: the power of two of a token, and eight columns as the kernels read them.
// ---------------------------------------------------------------------------------------------------------------------
template <bool HALF>
MQ_DEVICE float input_of(u16 word) { return HALF ? f16_low(word) : bf16_low(word); }

// The largest of eight inputs without sign, as bits: 16-bit floats without sign are ordered like integers.
MQ_DEVICE u32 largest_of(const U4& words) {
    u32 largest = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u32 both = word_of(words, j);
        largest = max(largest, max(both & 0x7FFF, both >> 16 & 0x7FFF));
    }
    return largest;
}

struct Scale {
    float factor, back;
};

// 2^power, which brings the largest input to 2^13 .. 2^14, and 2^-power; zeros, infinities and NaN stay as they are.
template <bool HALF>
MQ_DEVICE Scale scale_for(u32 largest) {
    const int exponent = static_cast<int>(__float_as_uint(input_of<HALF>(static_cast<u16>(largest))) >> 23) - 127;
    const int power = exponent == 128 || largest == 0 ? 0 : min(13 - exponent, 126);
    return {__uint_as_float(static_cast<u32>(127 + power) << 23), __uint_as_float(static_cast<u32>(127 - power) << 23)};
}

// Eight stored columns from `first` on, times factor: the inputs numbered in `numbers` (16 bits each) if ORDERED.
template <bool HALF, bool ORDERED>
MQ_DEVICE U4 arranged(const u16* inputs, const U4& numbers, int first, float factor) {
    auto scaled = [&](int k) {
        const u32 column = ORDERED ? word_of(numbers, k / 2) >> (k % 2 * 16) & 0xFFFF : first + k;
        return input_of<HALF>(inputs[column]) * factor;
    };
    return {pack_f16(scaled(0), scaled(4)), pack_f16(scaled(1), scaled(5)), pack_f16(scaled(2), scaled(6)),
            pack_f16(scaled(3), scaled(7))};
}

// BYTES (4, 8 or 16) of global to shared memory, without a register; copies_wait: all that this thread has asked for.
template <int BYTES>
MQ_DEVICE void copy_async(u32 to, const void* from) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

// `bytes` of constants that will be read soon, into L2: by all threads of a block.
MQ_DEVICE void prefetch_lines(const void* from, int bytes, int thread, int threads) {
    for (int i = thread * 128; i < bytes; i += threads * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const u8*>(from) + i));
}

MQ_DEVICE void copies_wait() { asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory"); }

// BYTES of constants (1, 2, 4, 8 or 16) into words, through the read-only path; they stay in L1 for the next reader.
// Only if `wanted`: a branch around a load would have it go to other registers first, and be waited for there.
template <int BYTES>
MQ_DEVICE void load_constant(u32* to, const void* from, bool wanted = true) {
    const u32 take = wanted;
    if constexpr (BYTES == 1) {
        asm volatile("{.reg .pred p;\n setp.ne.u32 p, %2, 0;\n @p ld.global.nc.u8 %0, [%1];}"
                     : "+r"(to[0]) : "l"(from), "r"(take));
    } else if constexpr (BYTES == 2) {
        asm volatile("{.reg .pred p;\n setp.ne.u32 p, %2, 0;\n @p ld.global.nc.u16 %0, [%1];}"
                     : "+r"(to[0]) : "l"(from), "r"(take));
    } else if constexpr (BYTES == 4) {
        asm volatile("{.reg .pred p;\n setp.ne.u32 p, %2, 0;\n @p ld.global.nc.u32 %0, [%1];}"
                     : "+r"(to[0]) : "l"(from), "r"(take));
    } else if constexpr (BYTES == 8) {
        asm volatile("{.reg .pred p;\n setp.ne.u32 p, %3, 0;\n @p ld.global.nc.v2.u32 {%0,%1}, [%2];}"
                     : "+r"(to[0]), "+r"(to[1]) : "l"(from), "r"(take));
    } else {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i)
            asm volatile("{.reg .pred p;\n setp.ne.u32 p, %5, 0;\n @p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
                         : "+r"(to[4 * i]), "+r"(to[4 * i + 1]), "+r"(to[4 * i + 2]), "+r"(to[4 * i + 3])
                         : "l"(static_cast<const U4*>(from) + i), "r"(take));
    }
}

// load_stream into place, if `wanted`.
MQ_DEVICE void load_stream_if(U4& to, const void* from, bool wanted) {
    asm volatile("{.reg .pred p;\n setp.ne.u32 p, %5, 0;\n"
                 " @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                 : "l"(from), "r"(static_cast<u32>(wanted)));
}

// BYTES (4, 8 or a multiple of 16) of shared memory.
template <int BYTES>
MQ_DEVICE void load_shared(u32* to, u32 from) {
    if constexpr (BYTES == 4) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to[0]) : "r"(from));
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from));
    } else {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i)
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(to[4 * i]), "=r"(to[4 * i + 1]), "=r"(to[4 * i + 2]), "=r"(to[4 * i + 3])
                         : "r"(from + 16 * i));
    }
}

// BYTES (4, 8 or a multiple of 16) that an earlier kernel wrote: not through the read-only path.
template <int BYTES>
MQ_DEVICE void load_written(u32* to, const void* from) {
    if constexpr (BYTES == 4) {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(to[0]) : "l"(from) : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i)
            asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(to[4 * i]), "=r"(to[4 * i + 1]), "=r"(to[4 * i + 2]), "=r"(to[4 * i + 3])
                         : "l"(static_cast<const U4*>(from) + i)
                         : "memory");
    }
}
