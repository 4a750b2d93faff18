// Inputs of the weight-only kernels as float16, scaled and in the order that half.cuh describes. One block a token.
#include "half.cuh"

constexpr int THREADS = MQ_THREADS;
constexpr bool HALF = MQ_HALF;        // inputs are float16, else bfloat16
constexpr bool ORDERED = MQ_ORDERED;  // stored columns have an order of their own
constexpr int TOKENS = MQ_TOKENS;     // of a pass of the kernel that follows
constexpr bool NATURAL = MQ_NATURAL;  // leave inputs in natural order, too: (pass, width, TOKENS)

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
    u32 largest = 0;
    for (int i = threadIdx.x; i < width / 8; i += THREADS) {
        const U4 words = from[i];
        reinterpret_cast<U4*>(row)[i] = words;
        largest = max(largest, largest_of(words));
    }
    largest = __reduce_max_sync(0xFFFFFFFFu, largest);
    if (threadIdx.x % 32 == 0) atomicMax(&most, largest);
    __syncthreads();

    const Scale scale = scale_for<HALF>(most);
    if (threadIdx.x == 0) factors[token] = scale.back;

    const int pieces = (width + CHUNK - 1) / CHUNK * (CHUNK / 8);
    U4* const to = image + static_cast<u64>(token) * (token_pitch(width) / 16);
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
        U4 piece = {};
        if (i * 8 < width) {
            U4 numbers = {};
            if constexpr (ORDERED) numbers = reinterpret_cast<const U4*>(order)[i];
            piece = arranged<HALF, ORDERED>(row, numbers, i * 8, scale.factor);
        }
        to[i / 16 * 16 + i % 4 * 4 + i % 16 / 4] = piece;
    }
    if constexpr (NATURAL) {
        u16* const own = natural + static_cast<u64>(token / TOKENS) * width * TOKENS + token % TOKENS;
        for (int i = threadIdx.x; i < width; i += THREADS)
            own[i * TOKENS] = static_cast<u16>(pack_f16(input_of<HALF>(row[i]) * scale.factor, 0.0f));
    }
}
