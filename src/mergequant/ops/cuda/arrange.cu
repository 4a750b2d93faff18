// Inputs of the weight-only kernels as float16, scaled and in the order that half.cuh describes. One block a token.
#include "half.cuh"

constexpr int THREADS = MQ_THREADS;
constexpr bool HALF = MQ_HALF;        // inputs are float16, else bfloat16
constexpr bool ORDERED = MQ_ORDERED;  // stored columns have an order of their own
constexpr int TOKENS = MQ_TOKENS;     // of a pass of the kernel that follows
constexpr bool NATURAL = MQ_NATURAL;  // leave inputs in natural order, too: (pass, width, TOKENS)
constexpr int TOP = 13;               // exponent that the largest value of a token gets

MQ_DEVICE float value_of(u16 word) { return HALF ? f16_low(word) : bf16_low(word); }

extern "C" __global__ void __launch_bounds__(THREADS)
arrange(const u16* x, const u16* order, U4* image, float* factors, u16* natural, int width) {
    extern __shared__ __align__(16) u16 row[];
    __shared__ u32 most;
    const int token = blockIdx.x;
    if (threadIdx.x == 0) most = 0;
    overlap_launch();
    overlap_wait();
    __syncthreads();

    const U4* const from = reinterpret_cast<const U4*>(x + static_cast<u64>(token) * width);
    u32 largest = 0;  // 16-bit floats without sign are ordered like integers
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        const U4 words = from[i];
        reinterpret_cast<U4*>(row)[i] = words;
        const u32 both[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) largest = max(largest, max(both[j] & 0x7FFF, both[j] >> 16 & 0x7FFF));
    }
    largest = __reduce_max_sync(0xFFFFFFFFu, largest);
    if (threadIdx.x % 32 == 0) atomicMax(&most, largest);
    __syncthreads();

    // 2^power times the largest value is in 2^13 .. 2^14; zeros, infinities and NaN are left as they are.
    const int exponent = static_cast<int>(__float_as_uint(value_of(static_cast<u16>(most))) >> 23) - 127;
    const int power = exponent == 128 || most == 0 ? 0 : min(TOP - exponent, 126);
    const float factor = __uint_as_float(static_cast<u32>(127 + power) << 23);
    if (threadIdx.x == 0) factors[token] = __uint_as_float(static_cast<u32>(127 - power) << 23);
    auto scaled = [&](int column) { return value_of(row[column]) * factor; };

    const int pieces = (width + CHUNK - 1) / CHUNK * (CHUNK / 8);
    U4* const to = image + static_cast<u64>(token) * (token_pitch(width) / 16);
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
        U4 piece = {};
        if (i * 8 < width) {
            u32 number[4] = {};
            if constexpr (ORDERED) load_constant<16>(number, order + i * 8);
            auto source = [&](int k) {
                return ORDERED ? static_cast<int>(number[k / 2] >> (k % 2 * 16) & 0xFFFF) : i * 8 + k;
            };
            piece.x = pack_f16(scaled(source(0)), scaled(source(4)));
            piece.y = pack_f16(scaled(source(1)), scaled(source(5)));
            piece.z = pack_f16(scaled(source(2)), scaled(source(6)));
            piece.w = pack_f16(scaled(source(3)), scaled(source(7)));
        }
        to[i / 16 * 16 + i % 4 * 4 + i % 16 / 4] = piece;
    }
    if constexpr (NATURAL) {
        u16* const own = natural + static_cast<u64>(token / TOKENS) * width * TOKENS + token % TOKENS;
        for (int i = threadIdx.x; i < width; i += THREADS) own[i * TOKENS] = static_cast<u16>(pack_f16(scaled(i), 0.0f));
    }
}
