// Rotated keys, and values, of new tokens into the pages of a cache: quantization, and codes to the slots they are told.
//
//     code = clamp(round(x * (1 / scale)))             float32, one rounding per operation, as the torch reference
//
// A block takes TOKENS neighbouring tokens and one key head. Codes go to shared memory first; words of the cache are put
// together from there. All bits of a key word belong to one token. A value word holds one channel of four tokens (8 bits)
// or eight (4 bits), so runs of tokens that follow one another in a group of 32 slots are written together: whole words at
// once, words that hold other tokens too by two atomic operations on the own bits. Every bit has one owner, so any mix of
// slots is right, in any order of blocks.
//
// The stored token (MQ_STORED): where a token in the first slot of a page has the stored key, in all heads, the code of
// its channel 0 becomes one that no key has, by which attention knows it, and its value becomes the stored one in place,
// for attention over the floats of this very step.
#include "mma.cuh"

constexpr int HEAD = MQ_HEAD;         // channels of a head: 64 or 128
constexpr int BITS = MQ_BITS;         // of a code: 4 or 8
constexpr int TOKENS = MQ_TOKENS;     // of a block: 32, or 4 where there are few
constexpr bool FLOAT16 = MQ_FLOAT16;  // key and value are float16, else bfloat16
constexpr bool STORED = MQ_STORED;    // there is a stored token

constexpr int THREADS = TOKENS == 32 ? 256 : 128;
constexpr int PIECES = HEAD / 8;                   // 16-byte loads of a key or a value
constexpr int CODE_ROW = HEAD + 4;                 // bytes; off a multiple of 128, so that tokens lie in different banks
constexpr int LIMIT = BITS == 4 ? 7 : 127;
constexpr u32 CODE = BITS == 4 ? 0x0F : 0xFF;
constexpr int SLOT_BYTES = HEAD * BITS / 8;
constexpr int OPERAND_WORDS = BITS == 8 ? 2 : 1;
constexpr int KEY_WORDS = HEAD / 32 * OPERAND_WORDS;  // of a lane, for the keys of a group of 8 tokens
constexpr int GROUP_WORDS = HEAD * BITS;              // of the values of a group of 32 tokens
constexpr int LINE = 128;                             // words of a 16-byte load of a warp, in which the cache is laid out
constexpr int NOWHERE = -1;

struct Place {
    u64 head;   // bytes from the start of the pages to the keys of the block's head in the token's page
    int token;  // in its page; NOWHERE: it is not stored
};

MQ_DEVICE float low_half(u32 word) { return FLOAT16 ? f16_low(word) : bf16_low(word); }
MQ_DEVICE float high_half(u32 word) { return FLOAT16 ? f16_high(word) : bf16_high(word); }

MQ_DEVICE u32 code_of(float x, float inverse) {
    const i32 code = round_even(__fmul_rn(x, inverse));
    return (u32)max(-LIMIT, min(LIMIT, code)) & 0xFF;
}

MQ_DEVICE u32 codes_of(u32 first, u32 second, const float* inverse) {
    return code_of(low_half(first), inverse[0]) | code_of(high_half(first), inverse[1]) << 8 |
           code_of(low_half(second), inverse[2]) << 16 | code_of(high_half(second), inverse[3]) << 24;
}

// Grid (key heads, ceil(tokens / TOKENS)).
//   key, value (tokens, key heads, HEAD), tokens key_stride and value_stride floats apart; slots (tokens), < 0: none;
//   pages (.., 2, key heads, page, SLOT_BYTES); scales, stored_key, stored_value (key heads, HEAD).
extern "C" __global__ void __launch_bounds__(THREADS)
kv_store(const u16* __restrict__ key, u16* __restrict__ value, const long long* __restrict__ slots, u8* pages,
         const float* __restrict__ key_scale, const float* __restrict__ value_scale,
         const u16* __restrict__ stored_key, const u16* __restrict__ stored_value, int tokens, int key_stride,
         int value_stride, int page) {
    __shared__ alignas(16) i8 codes[2][TOKENS][CODE_ROW];
    __shared__ alignas(16) float inverse_scale[2][HEAD];  // of keys, of values
    __shared__ Place places[TOKENS];
    const int key_heads = gridDim.x, key_head = blockIdx.x, first = blockIdx.y * TOKENS;
    const u64 half_page = (u64)key_heads * page * SLOT_BYTES;  // its keys, or its values
    for (int c = threadIdx.x; c < HEAD; c += THREADS) {
        inverse_scale[0][c] = __frcp_rn(key_scale[key_head * HEAD + c]);
        inverse_scale[1][c] = __frcp_rn(value_scale[key_head * HEAD + c]);
    }
    if (threadIdx.x < TOKENS) {
        const long long slot = first + threadIdx.x < tokens ? slots[first + threadIdx.x] : -1;
        const u32 known = slot < 0 ? 0 : (u32)slot;
        places[threadIdx.x].head = (u64)(known / page) * 2 * half_page + (u64)key_head * page * SLOT_BYTES;
        places[threadIdx.x].token = slot < 0 ? NOWHERE : (int)(known % page);
    }
    __syncthreads();

    constexpr int LOADS = 2 * TOKENS * PIECES;
#pragma unroll
    for (int round = 0; round < (LOADS + THREADS - 1) / THREADS; round++) {
        const int i = round * THREADS + threadIdx.x, channel = i % PIECES * 8, own = i / PIECES % TOKENS;
        const int is_value = i / (PIECES * TOKENS);
        if (i >= LOADS || places[own].token == NOWHERE) continue;
        const u64 token = first + own;
        const u16* from = (is_value ? value + token * value_stride : key + token * key_stride) + key_head * HEAD + channel;
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        const float* inverse = inverse_scale[is_value] + channel;
        u32* to = reinterpret_cast<u32*>(codes[is_value][own] + channel);
        to[0] = codes_of(four.x, four.y, inverse);
        to[1] = codes_of(four.z, four.w, inverse + 4);
    }
    __syncthreads();

    if (STORED) {
        const u32* wanted = reinterpret_cast<const u32*>(stored_key);
        for (int own = 0; own < TOKENS; own++) {
            if (places[own].token != 0) continue;
            const u32* given = reinterpret_cast<const u32*>(key + (u64)(first + own) * key_stride);
            bool same = true;
            for (int i = threadIdx.x; i < HEAD / 2; i += THREADS)
                same = same && given[key_head * HEAD / 2 + i] == wanted[key_head * HEAD / 2 + i];
            if (!__syncthreads_and(same)) continue;  // nearly always
            for (int i = threadIdx.x; i < key_heads * HEAD / 2; i += THREADS) same = same && given[i] == wanted[i];
            if (!__syncthreads_and(same)) continue;
            for (int c = threadIdx.x; c < HEAD; c += THREADS)
                value[(u64)(first + own) * value_stride + key_head * HEAD + c] = stored_value[key_head * HEAD + c];
            if (threadIdx.x == 0) codes[0][own][0] = -LIMIT - 1;
        }
        __syncthreads();
    }

    // Keys: neighbouring threads write neighbouring words of a token.
    for (int i = threadIdx.x; i < TOKENS * KEY_WORDS * 4; i += THREADS) {
        const int operand = i % KEY_WORDS, t = i / KEY_WORDS % 4, own = i / (KEY_WORDS * 4);
        const Place place = places[own];
        if (place.token == NOWHERE) continue;
        const i8* from = codes[0][own] + operand / OPERAND_WORDS * 32 + operand % OPERAND_WORDS * 16 + t * 4;
        u32 word = *reinterpret_cast<const u32*>(from);
        if (BITS == 4) word = (word & 0x0F0F0F0Fu) | (*reinterpret_cast<const u32*>(from + 16) & 0x0F0F0F0Fu) << 4;
        const int n = place.token / 8 * KEY_WORDS + operand, lane = place.token % 8 * 4 + t;
        reinterpret_cast<u32*>(pages + place.head)[n / 4 * LINE + lane * 4 + n % 4] = word;
    }

    // Values: runs of tokens in one group of 32 slots. Every warp finds the same runs.
    const int lane = threadIdx.x % 32;
    const Place own_place = places[lane % TOKENS];
    const int token = lane < TOKENS ? own_place.token : NOWHERE;
    const int before = __shfl_up_sync(~0u, token, 1);
    const u64 head_before = __shfl_up_sync(~0u, own_place.head, 1);
    const u32 valid = __ballot_sync(~0u, token != NOWHERE);
    u32 starts = __ballot_sync(~0u, token != NOWHERE && (lane == 0 || before == NOWHERE || before + 1 != token ||
                                                         head_before != own_place.head || token % 32 == 0));
    while (starts) {
        const int start = __ffs(starts) - 1;
        starts &= starts - 1;
        const u32 until_next = starts ? (1u << (__ffs(starts) - 1)) - 1 : ~0u;
        const int count = __popc(valid & until_next & (~0u << start));
        const Place place = places[start];
        const int at = place.token % 32;
        const u32 fresh = (count == 32 ? ~0u : (1u << count) - 1) << at;  // slots of the group
        u32* words = reinterpret_cast<u32*>(pages + place.head + half_page) + place.token / 32 * GROUP_WORDS;
        for (int i = threadIdx.x; i < GROUP_WORDS; i += THREADS) {
            const int line_lane = i % LINE / 4, g = line_lane / 4, t = line_lane % 4, n = i / LINE * 4 + i % 4;
            const int channel = n / OPERAND_WORDS * 8 + g;
            u32 word = 0, own = 0;
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int half = 0; half < 3 - OPERAND_WORDS; half++) {
                    const int slot = 8 * (j / 2) + 2 * t + j % 2 + 16 * (BITS == 4 ? half : n % 2);
                    if (!(fresh >> slot & 1)) continue;
                    word |= ((u32)(u8)codes[1][start + slot - at][channel] & CODE) << (8 * j + 4 * half);
                    own |= CODE << (8 * j + 4 * half);
                }
            if (own == ~0u) {
                words[i] = word;
            } else if (own) {
                atomicAnd(words + i, word | ~own);
                atomicOr(words + i, word);
            }
        }
    }
}
