// What this chip can do at best, for `mergequant bench`: read memory, and multiply int8 without loading anything.
//
// MQ_WGMMA = 1 adds the wgmma kernel, which only sm_90a has; it needs the generated header "wgmma.cuh".
#include "mma.cuh"
#if MQ_WGMMA
#include "tma.cuh"
#include "wgmma.cuh"
#endif

constexpr int READ_THREADS = 512;
constexpr int READS_AHEAD = 8;  // 16-byte loads that a thread has under way

// Reads `count` times 16 bytes once. The exclusive-or of everything is compared with a word that it hardly ever is, so
// that no load can be left out and next to nothing is written.
extern "C" __global__ void __launch_bounds__(READ_THREADS) read_all(const U4* data, long long count, u32* sink) {
    constexpr u32 UNLIKELY = 0x12345678u;
    const long long stride = static_cast<long long>(gridDim.x) * READ_THREADS;
    long long place = static_cast<long long>(blockIdx.x) * READ_THREADS + threadIdx.x;
    u32 all = 0;
    for (; place + (READS_AHEAD - 1) * stride < count; place += READS_AHEAD * stride) {
        U4 words[READS_AHEAD];
#pragma unroll
        for (int i = 0; i < READS_AHEAD; i++) words[i] = load_stream(data + place + i * stride);
#pragma unroll
        for (int i = 0; i < READS_AHEAD; i++) all ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    }
    for (; place < count; place += stride) {
        const U4 word = load_stream(data + place);
        all ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    if (all == UNLIKELY) *sink = all;
}

#if MQ_WGMMA
// Two warpgroups multiply the same operands again and again: A (64 x 32 per step) in registers, as the GEMMs here hold
// their weights, B (256 x 128 bytes) in shared memory, two copies in turns. Per iteration and block:
// 2 warpgroups * 4 steps * 64 * 256 * 32 multiply-adds.
constexpr int RATE_THREADS = 256;
constexpr int STEPS = 4;                                // of 32 k in a 128-byte row
constexpr int B_BYTES = WGMMA_TOKENS * 128;             // one copy
constexpr int SHARED_BYTES = 2 * B_BYTES;
constexpr int ALIGNMENT = 1024;                         // of a swizzled operand

extern "C" __global__ void __launch_bounds__(RATE_THREADS, 1) int8_rate(int iterations, const U4* source, i32* sink) {
    extern __shared__ u8 raw[];
    const u32 start = shared_address(raw);
    const u32 operands = (start + ALIGNMENT - 1) & ~static_cast<u32>(ALIGNMENT - 1);
    U4* copies = reinterpret_cast<U4*>(raw + (operands - start));
    for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += RATE_THREADS) copies[i] = source[i];
    shared_fence();
    __syncthreads();

    i32 sums[WGMMA_REGISTERS];
#pragma unroll
    for (int i = 0; i < WGMMA_REGISTERS; i++) sums[i] = 0;
    U4 a[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) a[step] = source[threadIdx.x + step * RATE_THREADS];

    for (int iteration = 0; iteration < iterations; iteration++) {
        const u64 b = wgmma_descriptor(operands + (iteration & 1) * B_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; step++)  // 32 bytes further is 2 in a descriptor
            wgmma_s8(sums, a[step].x, a[step].y, a[step].z, a[step].w, b + 2 * step, 1);
        wgmma_commit();
        wgmma_wait<0>();
    }
    i32 total = 0;
#pragma unroll
    for (int i = 0; i < WGMMA_REGISTERS; i++) total += sums[i];
    sink[blockIdx.x * RATE_THREADS + threadIdx.x] = total;
}
#endif
