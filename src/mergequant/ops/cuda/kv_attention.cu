// Decode attention of one new token per sequence over an int4 or int8 cache with static per-channel scales.
//
//     out[h] = sum_s softmax_s(q[h] . key[s] * softmax_scale) value[s],     key = code * key_scale, value = code * value_scale
//
// The idea: no code is ever turned into a float. The channel scales of the keys are folded into q, those of the values
// into the output, and both products run on the int8 tensor core (mma.sync m16n8k32) with the codes as they lie in the
// cache (../kv_layout.py). The float operands become integers of two digits:
//     q -> 15 bits = 128 * high + low, high in -127..127, low in 0..127, relative to the head's largest |q * key_scale|
//     p -> 16 bits = 256 * high + low, both in 0..255, relative to the largest p of the chunk
// A tile of the tensor core has 16 rows. Rows 0..7 hold the high digits of up to 8 query heads that share a key head,
// rows 8..15 their low digits, so both digits, and grouped queries, cost the instructions of one. A lane (g, t) of the
// result holds both digits of head g and recombines them: base * d[0] + d[2]. Integer sums are exact (below 2^31).
//
// Every chunk has its own unit of p (its largest), not that of the running maximum: else one token that takes nearly all
// of the softmax (an attention sink) would leave all later tokens of its warp without digits. Tokens of the sink's own
// chunk are off by up to half a unit, 2^-17 of the sink's p, each.
//
// Work: a block is one (sequence, key head, split), its warps take chunks of tokens in turn. Splits of a (sequence, key
// head) form a cluster and are combined through distributed shared memory.
//
// Pages (MQ_PAGED): slot s of a row lies in page table[row][s / page] (../kv_pages.py), at s % page. Pages are multiples of
// 64 slots, so no chunk is in two of them. Nothing else differs: results are those of a contiguous row, bit for bit.
// The prefix counts for the rows alone whose first page is marked; where there is one, a few results round otherwise.
//
// Overlap with the kernel ahead (`early` != 0). The caller promises that `lengths` and all slots of the cache except each
// row's newest were written before the `kv_append` of this token was launched, and that this append is the last kernel
// that wrote the cache. Then the chunks that do not hold the newest slot are loaded before overlap_wait(). Proof that
// they are complete: this kernel starts after all blocks of the append have called overlap_launch() (kernels of a stream
// start in order), and the append calls it after its own overlap_wait(), that is after the kernel ahead of it has
// completed; that kernel completed after its own wait, and so on to the first. Without the promise nothing is read early.
//
// Compile-time parameters.
#include "mma.cuh"

constexpr int HEAD = MQ_HEAD;        // channels of a head: 64 or 128
constexpr int BITS = MQ_BITS;        // of a code: 4 or 8
constexpr int GROUP = MQ_GROUP;      // query heads of a key head: 1..8
constexpr int WARPS = MQ_WARPS;      // of a block
constexpr int BLOCKS = MQ_BLOCKS;    // that shall fit on a multiprocessor: limits the registers of a thread
constexpr bool FLOAT16 = MQ_FLOAT16; // q, prefix and output are float16, else bfloat16
constexpr bool PREFIX = MQ_PREFIX;   // the first slots are attended in float
constexpr bool PAGED = MQ_PAGED;     // the cache lies in pages

constexpr int THREADS = WARPS * 32;
constexpr int SLOT_BYTES = HEAD * BITS / 8;
constexpr u32 MARK = BITS == 4 ? 0x08 : 0x80;       // code of a key's channel 0 that says "the stored token"; no key has it
constexpr u32 CODE = BITS == 4 ? 0x0F : 0xFF;       // the bits of a code
constexpr int MAX_SPLITS = 8;        // of the portable cluster size
constexpr int MAX_PREFIX = 8;

// Shape of a chunk: what a warp holds in registers, and fetches ahead, at once. At most 4 KB of keys and of values.
constexpr int CHUNK = 4096 * 8 / (HEAD * BITS) < 64 ? 4096 * 8 / (HEAD * BITS) : 64;
constexpr int CHUNK_BYTES = CHUNK * HEAD * BITS / 8;
constexpr int UNIT_BYTES = 32 * 16;                 // a 16-byte load of every lane
constexpr int UNITS = CHUNK_BYTES / UNIT_BYTES;
constexpr int KEY_TILES = CHUNK / 8;                // columns of the first product, 8 tokens each
constexpr int STEPS = HEAD / 32;                    // k-steps of the first product
constexpr int VALUE_GROUPS = CHUNK / 32;            // k-steps of the second product
constexpr int CHANNEL_TILES = HEAD / 8;             // columns of the second product

constexpr i32 Q_BASE = 128, P_BASE = 256;
constexpr float Q_TOP = 127 * Q_BASE, P_TOP = 255 * P_BASE;  // largest two-digit numbers used
constexpr float CODE_UNIT = BITS == 4 ? 1.f / 16 : 1.f;  // nibbles enter the tensor core as 16 * code
constexpr float ROUNDER = 12582912.f;               // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
constexpr u32 ROUNDER_BITS = 0x4B400000u;
// Scores are base-2 logarithms. A hidden slot scores HIDDEN; maxima start at LOWEST, far above it, so that a hidden slot
// has p = 0 even where nothing else is visible.
constexpr float HIDDEN = -1e30f;
constexpr float LOWEST = -1e29f;

MQ_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MQ_DEVICE float low_half(u32 word) { return FLOAT16 ? f16_low(word) : bf16_low(word); }
MQ_DEVICE float high_half(u32 word) { return FLOAT16 ? f16_high(word) : bf16_high(word); }

MQ_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

MQ_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// One chunk of keys or of values in registers.
struct Chunk {
    U4 unit[UNITS];

    __device__ __forceinline__ void load(const u8* from) {
#pragma unroll
        for (int i = 0; i < UNITS; i++) unit[i] = load_stream(from + i * UNIT_BYTES);
    }

    // Word n of the lane; n is a constant wherever this is used.
    __device__ __forceinline__ u32 word(int n) const {
        const U4& four = unit[n / 4];
        return n % 4 == 0 ? four.x : n % 4 == 1 ? four.y : n % 4 == 2 ? four.z : four.w;
    }

    // The two words of operand number n.
    __device__ __forceinline__ u32 first(int n) const { return BITS == 4 ? low_nibbles_x16(word(n)) : word(2 * n); }
    __device__ __forceinline__ u32 second(int n) const { return BITS == 4 ? high_nibbles_x16(word(n)) : word(2 * n + 1); }
};

// Two digits of four numbers of 0..65535, given as floats with ROUNDER added: the low bytes, and the bytes above them.
MQ_DEVICE void split_digits(const float* rounded, u32& high, u32& low) {
    const u32 first = __byte_perm(__float_as_uint(rounded[0]), __float_as_uint(rounded[1]), 0x5140);
    const u32 second = __byte_perm(__float_as_uint(rounded[2]), __float_as_uint(rounded[3]), 0x5140);
    low = __byte_perm(first, second, 0x5410);
    high = __byte_perm(first, second, 0x7632);
}

struct Partials {
    float maximum[WARPS][GROUP];
    float sum[WARPS][GROUP];
    float out[WARPS][GROUP * HEAD];
    // The block's own result, which the cluster reads. Its output reuses out[0].
    float block_maximum[GROUP];
    float block_sum[GROUP];
    float prefix_score[GROUP][MAX_PREFIX];
};

// Grid (key heads, splits, batch); the splits of a (key head, row) are a cluster.
//   q (batch, key heads * GROUP, HEAD), rows q_stride apart; keys and values (batch, key heads, capacity, SLOT_BYTES), or
//   (pages, key heads, page, SLOT_BYTES), pages page_stride bytes apart; table (batch, capacity / page), rows table_stride
//   apart; lengths (batch): visible slots with the newest; scales (key heads, HEAD); prefix (key heads, prefix, HEAD).
//   out: floats like q if out_multiplier is null, else int8 codes within +-2^(out_bits - 1).
//   expected: bound of the lengths that the host knows, only used to load ahead of `lengths`.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
kv_attention(const u16* __restrict__ q, const u8* __restrict__ keys, const u8* __restrict__ values,
             const i32* __restrict__ lengths, const float* __restrict__ key_scale,
             const float* __restrict__ value_scale, const u16* __restrict__ prefix_key,
             const u16* __restrict__ prefix_value, const float* __restrict__ out_multiplier, void* __restrict__ out,
             float softmax_scale_log2, int capacity, int expected, int prefix, int multiplier_stride,
             int out_bits, int early, int q_stride, const i32* __restrict__ table, int table_stride, int page,
             long long page_stride) {
    __shared__ Partials shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int split = blockIdx.y, splits = gridDim.y;
    const int key_head = blockIdx.x, row = blockIdx.z, pair = row * gridDim.x + key_head;
    auto q_of = [&](int g) {
        return PAGED ? (u64)row * q_stride + (key_head * GROUP + g) * HEAD : (u64)(pair * GROUP + g) * HEAD;
    };
    // Where the head starts for this lane, and a chunk behind that. The number of its page is read a round ahead.
    const u64 head_start = (PAGED ? (u64)key_head * page : (u64)pair * capacity) * SLOT_BYTES + lane * 16;
    const i32* numbers = table + (u64)row * table_stride;
    const int page_chunks = PAGED ? page / CHUNK : 1;
    auto start_of = [&](int chunk, i32 number) {
        if (!PAGED) return (u64)chunk * CHUNK_BYTES;
        return (u64)number * page_stride + (u64)(chunk % page_chunks) * CHUNK_BYTES;
    };
    auto number_of = [&](int chunk, int slots) { return PAGED && chunk * CHUNK < slots ? numbers[chunk / page_chunks] : 0; };

    // Chunks go round the warps of all splits.
    int chunk = split * WARPS + warp;
    const int stride = splits * WARPS;
    Chunk k, v;
    int length = 0;
    i32 number = 0;
    bool loaded = false;
    if (early && !PAGED) {
        length = lengths[row];
        loaded = (chunk + 1) * CHUNK < length;  // the newest slot lies behind this chunk
        if (loaded) {
            k.load(keys + head_start + start_of(chunk, 0));
            v.load(values + head_start + start_of(chunk, 0));
        }
    }
    overlap_launch();
    overlap_wait();
    if (PAGED) {
        number = number_of(chunk, capacity);
        length = lengths[row];
    } else if (!early) {
        // The first chunk does not wait for `lengths`: what the row turns out not to have is loaded in vain.
        loaded = chunk * CHUNK < expected;
        if (loaded) {
            k.load(keys + head_start + start_of(chunk, 0));
            v.load(values + head_start + start_of(chunk, 0));
        }
        length = lengths[row];
    }
    length = max(0, min(length, capacity));
    const int chunks = (length + CHUNK - 1) / CHUNK;
    if (!loaded && chunk < chunks) {
        k.load(keys + head_start + start_of(chunk, number));
        v.load(values + head_start + start_of(chunk, number));
    }
    number = number_of(chunk + stride, length);
    // Slots that the prefix stands for.
    int stored = PREFIX ? prefix : 0;
    if (PREFIX && PAGED && length > 0)
        stored *= (keys[head_start - lane * 16 + (u64)numbers[0] * page_stride] & CODE) == MARK;
    // The last split, which has the fewest chunks, takes the float prefix too.
    const int own_prefix = PREFIX && split == splits - 1 ? min(stored, length) : 0;

    // q of head g, the channels that lane t holds as operand; then its digits.
    u32 q_digits[STEPS][4];
    float score_unit;
    {
        float x[STEPS][2][4];
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int channel = step * 32 + half * 16 + t * 4;
                uint2 word = make_uint2(0, 0);
                if (g < GROUP) word = *reinterpret_cast<const uint2*>(q + q_of(g) + channel);
                x[step][half][0] = low_half(word.x) * softmax_scale_log2;
                x[step][half][1] = high_half(word.x) * softmax_scale_log2;
                x[step][half][2] = low_half(word.y) * softmax_scale_log2;
                x[step][half][3] = high_half(word.y) * softmax_scale_log2;
            }
        if (PREFIX) {
            for (int slot = warp; slot < own_prefix; slot += WARPS) {
                float dot = 0;
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int channel = step * 32 + half * 16 + t * 4;
                        const uint2 word = *reinterpret_cast<const uint2*>(
                            prefix_key + ((u64)key_head * prefix + slot) * HEAD + channel);
                        dot += x[step][half][0] * low_half(word.x) + x[step][half][1] * high_half(word.x) +
                               x[step][half][2] * low_half(word.y) + x[step][half][3] * high_half(word.y);
                    }
                dot = quad_sum(dot);
                if (t == 0 && g < GROUP) shared.prefix_score[g][slot] = dot;
            }
        }
        float largest = 1e-20f;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int channel = step * 32 + half * 16 + t * 4;
                const float4 scale = *reinterpret_cast<const float4*>(key_scale + key_head * HEAD + channel);
                x[step][half][0] *= scale.x;
                x[step][half][1] *= scale.y;
                x[step][half][2] *= scale.z;
                x[step][half][3] *= scale.w;
#pragma unroll
                for (int j = 0; j < 4; j++) largest = fmaxf(largest, fabsf(x[step][half][j]));
            }
        largest = quad_max(largest);
        const float to_digits = Q_TOP / largest;
        score_unit = largest * (CODE_UNIT / Q_TOP);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 high = 0, low = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const i32 number = round_even(x[step][half][j] * to_digits);
                    high |= (u32)((number >> 7) & 0xFF) << (8 * j);  // the shift rounds down, so low is never negative
                    low |= (u32)(number & 0x7F) << (8 * j);
                }
                q_digits[step][half * 2] = high;     // row g
                q_digits[step][half * 2 + 1] = low;  // row g + 8
            }
    }

    // Running softmax of head g. Sums are in units of 1 / P_TOP, outputs in units of value_scale * CODE_UNIT / P_TOP.
    float maximum = LOWEST, sum = 0;
    float output[CHANNEL_TILES][2];
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; i++) output[i][0] = output[i][1] = 0;

    while (chunk < chunks) {
        float score[KEY_TILES * 2];
#pragma unroll
        for (int tile = 0; tile < KEY_TILES; tile++) {
            i32 d[4] = {0, 0, 0, 0};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const u32 (&a)[4] = q_digits[step];
                mma_s8(d, a[0], a[1], a[2], a[3], k.first(tile * STEPS + step), k.second(tile * STEPS + step));
            }
            score[2 * tile] = (float)(d[0] * Q_BASE + d[2]) * score_unit;
            score[2 * tile + 1] = (float)(d[1] * Q_BASE + d[3]) * score_unit;
        }
        if (chunk == chunks - 1 || (PREFIX && chunk == 0)) {
#pragma unroll
            for (int i = 0; i < KEY_TILES * 2; i++) {
                const int slot = chunk * CHUNK + i / 2 * 8 + t * 2 + i % 2;
                if (slot >= length || (PREFIX && slot < stored)) score[i] = HIDDEN;
            }
        }
        const int next = chunk + stride;
        const u64 next_start = start_of(next, number);
        if (next < chunks) k.load(keys + head_start + next_start);
        number = number_of(next + stride, length);

        float chunk_maximum = score[0];
#pragma unroll
        for (int i = 1; i < KEY_TILES * 2; i++) chunk_maximum = fmaxf(chunk_maximum, score[i]);
        chunk_maximum = fmaxf(quad_max(chunk_maximum), LOWEST);
        const float new_maximum = fmaxf(maximum, chunk_maximum);
        const float old_weight = exp2_fast(maximum - new_maximum), new_weight = exp2_fast(chunk_maximum - new_maximum);
        maximum = new_maximum;

        u32 total = 0;
#pragma unroll
        for (int i = 0; i < KEY_TILES * 2; i++) {
            score[i] = __fmaf_rn(exp2_fast(score[i] - chunk_maximum), P_TOP, ROUNDER);
            total += __float_as_uint(score[i]);
        }
        total -= (u32)(KEY_TILES * 2) * ROUNDER_BITS;
        sum = sum * old_weight + (float)(i32)total * new_weight;

        u32 p_digits[VALUE_GROUPS][4];
#pragma unroll
        for (int group = 0; group < VALUE_GROUPS; group++) {
            split_digits(score + group * 8, p_digits[group][0], p_digits[group][1]);
            split_digits(score + group * 8 + 4, p_digits[group][2], p_digits[group][3]);
        }
#pragma unroll
        for (int tile = 0; tile < CHANNEL_TILES; tile++) {
            i32 d[4] = {0, 0, 0, 0};
#pragma unroll
            for (int group = 0; group < VALUE_GROUPS; group++) {
                const u32 (&a)[4] = p_digits[group];
                const int n = group * CHANNEL_TILES + tile;
                mma_u8s8(d, a[0], a[1], a[2], a[3], v.first(n), v.second(n));
            }
            output[tile][0] = output[tile][0] * old_weight + (float)(d[0] * P_BASE + d[2]) * new_weight;
            output[tile][1] = output[tile][1] * old_weight + (float)(d[1] * P_BASE + d[3]) * new_weight;
        }
        if (next < chunks) v.load(values + head_start + (PAGED ? next_start : start_of(next, 0)));
        chunk = next;
    }

    // Warps of the block. Thread i takes elements i, i + THREADS, ... of the block's GROUP x HEAD outputs; the channels
    // of those elements repeat after OWN_CHANNELS, whose factors are fetched before the barrier.
    constexpr int OWN_CHANNELS = HEAD > THREADS ? HEAD / THREADS : 1;
    constexpr int ELEMENTS = GROUP * HEAD;
    sum = quad_sum(sum);
    if (g < GROUP) {
#pragma unroll
        for (int tile = 0; tile < CHANNEL_TILES; tile++)
            *reinterpret_cast<float2*>(&shared.out[warp][g * HEAD + tile * 8 + t * 2]) =
                make_float2(output[tile][0], output[tile][1]);
        if (t == 0) {
            shared.maximum[warp][g] = maximum;
            shared.sum[warp][g] = sum;
        }
    }
    float value_unit[OWN_CHANNELS], own_value[OWN_CHANNELS][MAX_PREFIX];
#pragma unroll
    for (int i = 0; i < OWN_CHANNELS; i++) {
        const int channel = (threadIdx.x + i * THREADS) % HEAD;
        value_unit[i] = value_scale[key_head * HEAD + channel] * (CODE_UNIT / P_TOP);
        if (PREFIX) {
#pragma unroll
            for (int slot = 0; slot < MAX_PREFIX; slot++)
                own_value[i][slot] =
                    slot < own_prefix ? low_half(prefix_value[((u64)key_head * prefix + slot) * HEAD + channel]) : 0.f;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < (ELEMENTS + THREADS - 1) / THREADS; i++) {
        const int element = threadIdx.x + i * THREADS, head = element / HEAD;
        if (ELEMENTS % THREADS && element >= ELEMENTS) break;
        float top = LOWEST;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.maximum[w][head]);
        if (PREFIX)
            for (int slot = 0; slot < own_prefix; slot++) top = fmaxf(top, shared.prefix_score[head][slot]);
        float block_sum = 0, block_out = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2_fast(shared.maximum[w][head] - top);
            block_sum += shared.sum[w][head] * weight;
            block_out += shared.out[w][element] * weight;
        }
        block_sum *= 1.f / P_TOP;
        block_out *= value_unit[i % OWN_CHANNELS];
        if (PREFIX) {
#pragma unroll
            for (int slot = 0; slot < MAX_PREFIX; slot++)
                if (slot < own_prefix) {
                    const float p = exp2_fast(shared.prefix_score[head][slot] - top);
                    block_sum += p;
                    block_out += p * own_value[i % OWN_CHANNELS][slot];
                }
        }
        shared.out[0][element] = block_out;  // nobody else reads this element
        if (element % HEAD == 0) {
            shared.block_maximum[head] = top;
            shared.block_sum[head] = block_sum;
        }
    }

    // Splits of the cluster: every block reads all blocks' share of the elements it writes. All remote loads of an
    // element are issued together; one after the other they would cost two microseconds.
    if (splits > 1)
        cluster_sync();
    else
        __syncthreads();
    const int share = ELEMENTS / splits;
    for (int i = threadIdx.x; i < share; i += THREADS) {
        const int element = split * share + i, head = element / HEAD;
        const u64 place = (u64)pair * ELEMENTS + element;
        float multiplier = 0;
        if (out_multiplier) multiplier = out_multiplier[(key_head * ELEMENTS + element) * multiplier_stride];
        float total, result;
        if (splits == 1) {
            total = shared.block_sum[head];
            result = shared.out[0][element];
        } else {
            float maxima[MAX_SPLITS], sums[MAX_SPLITS], outs[MAX_SPLITS];
            const u32 at_maximum = shared_address(&shared.block_maximum[head]);
            const u32 at_sum = shared_address(&shared.block_sum[head]);
            const u32 at_out = shared_address(&shared.out[0][element]);
#pragma unroll
            for (int r = 0; r < MAX_SPLITS; r++) {
                maxima[r] = LOWEST;
                sums[r] = outs[r] = 0;
                if (r < splits) {
                    maxima[r] = cluster_load_f32(cluster_address(at_maximum, r));
                    sums[r] = cluster_load_f32(cluster_address(at_sum, r));
                    outs[r] = cluster_load_f32(cluster_address(at_out, r));
                }
            }
            float top = LOWEST;
            total = result = 0;
#pragma unroll
            for (int r = 0; r < MAX_SPLITS; r++) top = fmaxf(top, maxima[r]);
#pragma unroll
            for (int r = 0; r < MAX_SPLITS; r++) {
                const float weight = exp2_fast(maxima[r] - top);
                total += sums[r] * weight;
                result += outs[r] * weight;
            }
        }
        result = total > 0 ? result / total : 0;  // a row without visible slots gives zeros
        if (out_multiplier) {
            const int limit = 1 << (out_bits - 1);
            const i32 code = round_even(__fmul_rn(result, multiplier));
            static_cast<i8*>(out)[place] = (i8)max(-limit, min(limit - 1, code));
        } else {
            static_cast<u16*>(out)[place] = (u16)(FLOAT16 ? pack_f16(result, 0) : pack_bf16(result, 0));
        }
    }
    if (splits > 1) cluster_sync();  // shared memory must outlive its readers
}
