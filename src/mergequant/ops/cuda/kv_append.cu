// New tokens into the cache: rotary embedding (and per-head RMSNorm) of queries and keys, quantization of keys and values.
//
//     y = x * rsqrt(mean(x^2) + eps) * norm[d]                     (queries and keys, where the model has such a norm)
//     r[d] = y[d] cos[d] - y[d + D/2] sin[d],  r[d + D/2] = y[d + D/2] cos[d] + y[d] sin[d]       (queries and keys)
//     code = clamp(round(r * (1 / key_scale)))                     (values: their own x and scale)
//
// All in float32, every product and sum rounded by itself (no fused multiply-add), so that codes equal those of the torch
// reference. Token s of a row goes to slot lengths[row] + s, which is also its position.
//
// A block owns one key head of one row and the tokens that fall into one aligned group of 32 slots: the group in which
// 4-bit values of different tokens share bytes (../kv_layout.py). So each byte has one writer. Codes go to shared memory
// first, then words of the cache are put together from there; words that also hold older tokens are fetched at the start
// and keep those tokens' bits.
//
// With many tokens, lanes own a token: all its vectors are asked for at once, three of them before the first is used, and
// its rotation once. A decode step (MQ_ONE) spreads the vectors of its one token over the threads, and waits for memory
// once behind the kernel ahead: it takes the token's position from `lengths` before that kernel has ended, loads the
// rotation for it, and reads `lengths` again afterwards. Only where they differ does it load again.
#include "mma.cuh"

constexpr int HEAD = MQ_HEAD;         // channels of a head: 64 or 128
constexpr int BITS = MQ_BITS;         // 4 or 8: quantized caches; 16: caches of floats like qkv, (.., capacity, HEAD)
constexpr int GROUP = MQ_GROUP;       // query heads of a key head
constexpr bool FLOAT16 = MQ_FLOAT16;  // qkv, q, k are float16, else bfloat16

constexpr bool ONE = MQ_ONE;          // one new token in every row

constexpr int SLOTS = 32;             // of a block
constexpr int HALF = HEAD / 2;
constexpr int VECTORS = GROUP + 2;    // of a token: query heads, then the key, then the value
constexpr int CHANNELS = ONE ? 4 : 8;                 // a lane takes channels c .. and c + HALF .., so many of each
constexpr int LANES = HALF / CHANNELS;                // of a vector
constexpr int THREADS = ONE ? 128 : SLOTS * LANES;
constexpr int AT_ONCE = THREADS / LANES;              // vectors that a round takes: of one token, or one of every token
constexpr int ROUNDS = ONE ? (VECTORS + AT_ONCE - 1) / AT_ONCE : VECTORS;
constexpr int AHEAD = ROUNDS < 3 ? ROUNDS : 3;        // rounds whose vectors are on their way
constexpr int BLOCKS = ONE ? 1 : (GROUP == 1 ? 768 : 512) / THREADS;  // that shall fit on a multiprocessor: limits the registers
constexpr int LINE = 128;                             // words of a 16-byte load of a warp, in which the cache is laid out
constexpr int CODE_ROW = HEAD + 4;                 // bytes; off a multiple of 128, so that tokens lie in different banks
constexpr int LIMIT = BITS == 4 ? 7 : 127;
constexpr int OPERAND_WORDS = BITS == 8 ? 2 : 1;
constexpr int STEPS = HEAD / 32;
constexpr int GROUP_WORDS = BITS == 16 ? THREADS : HEAD * BITS;  // 32-bit words of the keys, and of the values, of a block
constexpr int WORDS = GROUP_WORDS / THREADS;                     // of a thread
static_assert(THREADS % LINE == 0 && GROUP_WORDS % THREADS == 0, "every thread has the same number of words");

MQ_DEVICE float low_half(u32 word) { return FLOAT16 ? f16_low(word) : bf16_low(word); }
MQ_DEVICE float high_half(u32 word) { return FLOAT16 ? f16_high(word) : bf16_high(word); }
MQ_DEVICE u32 pack(float low, float high) { return FLOAT16 ? pack_f16(low, high) : pack_bf16(low, high); }

// A lane's channels of one half of a vector, as they lie in memory.
struct Piece {
    u32 words[CHANNELS / 2];
};

MQ_DEVICE Piece load(const u16* from) {
    Piece piece;
    if constexpr (CHANNELS == 8) {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        piece.words[0] = four.x, piece.words[1] = four.y, piece.words[2] = four.z, piece.words[3] = four.w;
    } else {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        piece.words[0] = two.x, piece.words[1] = two.y;
    }
    return piece;
}

MQ_DEVICE void store(u16* to, const float (&x)[CHANNELS]) {
    if constexpr (CHANNELS == 8)
        *reinterpret_cast<uint4*>(to) =
            make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    else
        *reinterpret_cast<uint2*>(to) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

MQ_DEVICE void unpack(const Piece& piece, float (&x)[CHANNELS]) {
#pragma unroll
    for (int j = 0; j < CHANNELS / 2; j++) {
        x[2 * j] = low_half(piece.words[j]);
        x[2 * j + 1] = high_half(piece.words[j]);
    }
}

MQ_DEVICE void read(const float* from, float (&x)[CHANNELS]) {
#pragma unroll
    for (int j = 0; j < CHANNELS; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + j);
        x[j] = four.x, x[j + 1] = four.y, x[j + 2] = four.z, x[j + 3] = four.w;
    }
}

// What memory holds now: a length is read twice while a kernel ahead may be changing it.
MQ_DEVICE i32 load_fresh(const i32* address) {
    i32 value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Codes of a lane's channels of a key or a value, a byte each, to shared memory.
MQ_DEVICE void quantize(const float (&x)[CHANNELS], const float* inverse_scale, i8* to) {
    float inverse[CHANNELS];
    read(inverse_scale, inverse);
#pragma unroll
    for (int i = 0; i < CHANNELS; i += 4) {
        u32 codes = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const i32 code = round_even(__fmul_rn(x[i + j], inverse[i + j]));
            codes |= (u32)(max(-LIMIT, min(LIMIT, code)) & 0xFF) << (8 * j);
        }
        *reinterpret_cast<u32*>(to + i) = codes;
    }
}

// Bits of a value word that new tokens own. Bit s of `fresh` says that slot s of the group is new.
MQ_DEVICE u32 fresh_bits(u32 fresh, int t, int half) {
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int token = 8 * (j / 2) + 2 * t + j % 2;
        if (BITS == 4) {
            if (fresh >> token & 1) bits |= 0x0Fu << (8 * j);
            if (fresh >> (token + 16) & 1) bits |= 0xF0u << (8 * j);
        } else {
            if (fresh >> (token + 16 * half) & 1) bits |= 0xFFu << (8 * j);
        }
    }
    return bits;
}

// Grid (key heads, groups of 32 slots that the tokens may touch, batch).
//   qkv (batch, tokens, (queries + 2 * key heads) * HEAD); cosines and sines (>= capacity, HALF); lengths (batch);
//   scales (key heads, HEAD); norms (HEAD) or null; q (batch, tokens, queries, HEAD), k (batch, tokens, key heads, HEAD).
// A token beyond the capacity leaves the caches alone and gives NaN.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
kv_append(const u16* __restrict__ qkv, const float* __restrict__ cosines, const float* __restrict__ sines,
          const i32* lengths, u8* __restrict__ keys, u8* __restrict__ values, const float* __restrict__ key_scale,
          const float* __restrict__ value_scale, const float* __restrict__ query_norm,
          const float* __restrict__ key_norm, u16* __restrict__ q, u16* __restrict__ k, float eps, int tokens,
          int capacity) {
    __shared__ alignas(16) i8 key_codes[SLOTS][CODE_ROW], value_codes[SLOTS][CODE_ROW];
    __shared__ alignas(16) float inverse_scale[2][HEAD];  // of keys, of values
    const int key_heads = gridDim.x, key_head = blockIdx.x, row = blockIdx.z;
    const int own = threadIdx.x / LANES, channel = threadIdx.x % LANES * CHANNELS;
    // Constants, which no kernel ahead writes.
    if (BITS != 16) {
        for (int c = threadIdx.x; c < HEAD; c += THREADS) {
            inverse_scale[0][c] = __frcp_rn(key_scale[key_head * HEAD + c]);
            inverse_scale[1][c] = __frcp_rn(value_scale[key_head * HEAD + c]);
        }
        __syncthreads();
    }
    float cosine[CHANNELS], sine[CHANNELS];
    auto read_rotation = [&](int slot) {
        const u64 position = (u64)min(slot, capacity - 1) * HALF + channel;
        read(cosines + position, cosine);
        read(sines + position, sine);
    };
    const int expected = ONE ? max(0, load_fresh(lengths + row)) : 0;
    if (ONE) read_rotation(expected);

    // The wait comes first and the launch second: the attention kernel behind this one reads older slots of the cache
    // ahead of its own wait, and relies on everything ahead of *this* kernel having completed (see kv_attention.cu).
    // Only a decode step may start it early: more than one new token is more than the newest slot.
    overlap_wait();
    if (ONE) overlap_launch();

    // Vectors by rounds. Many tokens: the key, the value, then the queries of the lane's own token.
    auto vector_of = [&](int round) { return ONE ? round * AT_ONCE + own : (round + GROUP) % VECTORS; };
    auto head_of = [&](int vector) {
        return vector < GROUP    ? key_head * GROUP + vector
               : vector == GROUP ? key_heads * GROUP + key_head
                                 : key_heads * (GROUP + 1) + key_head;
    };
    Piece low_pieces[AHEAD], high_pieces[AHEAD];
    auto fetch = [&](int round, u64 token) {
        const int vector = min(vector_of(round), VECTORS - 1);
        const u16* source = qkv + (token * (key_heads * VECTORS) + head_of(vector)) * HEAD + channel;
        low_pieces[round % AHEAD] = load(source);
        high_pieces[round % AHEAD] = load(source + HALF);
    };
    if (ONE) {
#pragma unroll
        for (int round = 0; round < AHEAD; round++) fetch(round, row);
    }

    const int start = max(0, load_fresh(lengths + row));
    const int group_start = (start / SLOTS + blockIdx.y) * SLOTS;
    const int first = max(start, group_start), end = min(start + tokens, group_start + SLOTS);
    if (first >= end) return;
    const int stored_end = min(end, capacity);
    const u64 head_start = ((u64)row * key_heads + key_head) * capacity;
    // Lanes without a token go round with the others, which exchange sums with them.
    const int slot = ONE ? start : max(first, min(end - 1, group_start + own));
    const bool active = ONE || slot == group_start + own;
    const u64 token = (u64)row * tokens + (slot - start);
    if (!ONE) {
#pragma unroll
        for (int round = 0; round < AHEAD; round++) fetch(round, token);
    }
    if (!ONE || start != expected) read_rotation(slot);
    if (slot >= capacity) {
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) cosine[j] = __uint_as_float(0x7FC00000u);  // NaN
    }

    // Cache words of this thread: word `place % 4` of lane `place / 4` of WORDS lines.
    const int place = threadIdx.x % LINE, lane = place / 4, g = lane / 4, t = lane % 4;
    u32 old[WORDS], own_bits = 0;
    u32* key_words = nullptr;
    u32* value_words = nullptr;
    if (BITS != 16 && first < stored_end) {
        const u64 group_bytes = (head_start + group_start) * (HEAD * BITS / 8);
        key_words = reinterpret_cast<u32*>(keys + group_bytes) + threadIdx.x;
        value_words = reinterpret_cast<u32*>(values + group_bytes) + threadIdx.x;
        const u32 below_end = stored_end - group_start == SLOTS ? ~0u : (1u << (stored_end - group_start)) - 1;
        own_bits = fresh_bits(below_end & (~0u << (first - group_start)), t, place % OPERAND_WORDS);
        if (ONE && own_bits != 0 && own_bits != ~0u) {  // many tokens: rarely needed, so loaded at the end
#pragma unroll
            for (int unit = 0; unit < WORDS; unit++) old[unit] = value_words[unit * THREADS];
        }
    }

#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int vector = vector_of(round);
        float low[CHANNELS], high[CHANNELS];
        unpack(low_pieces[round % AHEAD], low);
        unpack(high_pieces[round % AHEAD], high);
        if (round + AHEAD < ROUNDS) fetch(round + AHEAD, token);
        if (query_norm || key_norm) {
            float squares = 0;
#pragma unroll
            for (int j = 0; j < CHANNELS; j++)
                squares = __fadd_rn(squares, __fadd_rn(__fmul_rn(low[j], low[j]), __fmul_rn(high[j], high[j])));
#pragma unroll
            for (int step = 1; step < LANES; step *= 2)
                squares = __fadd_rn(squares, __shfl_xor_sync(~0u, squares, step));
            const float* norm = vector < GROUP ? query_norm : vector == GROUP ? key_norm : nullptr;
            if (norm) {
                const float factor = rsqrtf(__fadd_rn(__fmul_rn(squares, 1.f / HEAD), eps));
                float gain_low[CHANNELS], gain_high[CHANNELS];
                read(norm + channel, gain_low);
                read(norm + channel + HALF, gain_high);
#pragma unroll
                for (int j = 0; j < CHANNELS; j++) {
                    low[j] = __fmul_rn(__fmul_rn(low[j], factor), gain_low[j]);
                    high[j] = __fmul_rn(__fmul_rn(high[j], factor), gain_high[j]);
                }
            }
        }
        if (vector <= GROUP) {
#pragma unroll
            for (int j = 0; j < CHANNELS; j++) {
                const float a = low[j], b = high[j];
                low[j] = __fsub_rn(__fmul_rn(a, cosine[j]), __fmul_rn(b, sine[j]));
                high[j] = __fadd_rn(__fmul_rn(b, cosine[j]), __fmul_rn(a, sine[j]));
            }
        }
        if (!active || vector >= VECTORS) continue;
        if (vector <= GROUP) {
            u16* target = vector < GROUP ? q + (token * (key_heads * GROUP) + head_of(vector)) * HEAD
                                         : k + (token * key_heads + key_head) * HEAD;
            store(target + channel, low);
            store(target + channel + HALF, high);
        }
        if (vector >= GROUP && slot < stored_end) {
            const bool is_key = vector == GROUP;
            if (BITS == 16) {
                u16* target = reinterpret_cast<u16*>(is_key ? keys : values) + (head_start + slot) * HEAD;
                store(target + channel, low);
                store(target + channel + HALF, high);
            } else {
                i8* target = (is_key ? key_codes : value_codes)[slot - group_start] + channel;
                quantize(low, inverse_scale[!is_key] + channel, target);
                quantize(high, inverse_scale[!is_key] + channel + HALF, target + HALF);
            }
        }
    }
    if (BITS == 16) return;
    __syncthreads();
    if (first >= stored_end) return;

    auto line = [&](int unit) { return (unit * THREADS + threadIdx.x) / LINE; };  // of a thread's word
    // Keys: all bits of a word belong to one token.
#pragma unroll
    for (int unit = 0; unit < WORDS; unit++) {
        const int n = line(unit) * 4 + place % 4;
        const int token = n / (STEPS * OPERAND_WORDS) * 8 + g;
        if (token < first - group_start || token >= stored_end - group_start) continue;
        const int step = n % (STEPS * OPERAND_WORDS) / OPERAND_WORDS, half = n % OPERAND_WORDS;
        const i8* codes = key_codes[token] + step * 32 + half * 16 + t * 4;
        u32 word = *reinterpret_cast<const u32*>(codes);
        if (BITS == 4)
            word = (word & 0x0F0F0F0Fu) | (*reinterpret_cast<const u32*>(codes + 16) & 0x0F0F0F0Fu) << 4;
        key_words[unit * THREADS] = word;
    }

    // Values: a word holds one channel of four tokens (8 bits) or eight (4 bits), older ones among them.
    if (own_bits == 0) return;
#pragma unroll
    for (int unit = 0; unit < WORDS; unit++) {
        const int n = line(unit) * 4 + place % 4, half = n % OPERAND_WORDS;
        const int own_channel = n / OPERAND_WORDS * 8 + g;
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int token = half * 16 + 8 * (j / 2) + 2 * t + j % 2;
            u32 byte = (u8)value_codes[token][own_channel];
            if (BITS == 4) byte = (byte & 0x0F) | ((u32)(u8)value_codes[token + 16][own_channel] & 0x0F) << 4;
            word |= byte << (8 * j);
        }
        if (own_bits != ~0u) word = (word & own_bits) | ((ONE ? old[unit] : value_words[unit * THREADS]) & ~own_bits);
        value_words[unit * THREADS] = word;
    }
}
