// RMSNorm and LayerNorm whose codes gather channels, alone or after the residual's addition, as in norm_quant.cu:
//
//     v = x, or residual <- round(residual + x) and v = residual;   v = v - mean(v)   (LayerNorm)
//     y = (v * rsqrt(mean(v^2) + eps))[index] * multiplier + shift,   code = clamp(round(y))
//
// An index and a multiplier for every code are four times what the row itself is, so a block takes many rows and keeps
// them: a thread has one group of channels and one group of codes. The row is gathered from shared memory, where it lies
// as it is stored; the next row is fetched meanwhile.
#include "elementwise.cuh"

constexpr int RESIDUAL = MQ_RESIDUAL;   // its element kind; -1: there is none
constexpr int GAIN = MQ_GAIN;           // element kind of the multiplier
constexpr bool CENTRE = MQ_CENTRE;      // LayerNorm
constexpr int BLOCKS = MQ_BLOCKS;       // on a multiprocessor: limits the registers

constexpr bool ADD = RESIDUAL >= 0;
constexpr int VALUES = ADD ? RESIDUAL : INPUT;  // element kind of what is normed
static_assert(ALIGNED && GATHERED && INPUT != FLOAT32 && VALUES != FLOAT32, "rows of 16-bit elements, aligned");

// A group of a row, and of its residual, as they are stored.
struct Fetched {
    uint4 value, before;
};

MQ_DEVICE Fetched fetch(const u16* x, const u16* residual, u64 row, int channels) {
    Fetched group = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    const u64 at = row * channels + first_column();
    if (first_column() < channels) {
        group.value = *reinterpret_cast<const uint4*>(x + at);
        if constexpr (ADD) group.before = *reinterpret_cast<const uint4*>(residual + at);
    }
    return group;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
norm_gather(const u16* x, u16* residual, const Element<GAIN>* multiplier, const i32* index, const float* shift,
            void* out, int rows, int channels, int width, float eps) {
    __shared__ __align__(16) u16 rows_at_hand[2][STEP];  // this one, and the last, which others may still gather
    const int column = first_column();
    Constants constants;
    load_constants<GAIN>(multiplier, shift, index, column, width, constants);
    overlap_launch();
    overlap_wait();

    const float count = static_cast<float>(channels);
    int row = blockIdx.x;
    Fetched next = fetch(x, residual, row, channels);
    for (int turn = 0; row < rows; row += gridDim.x, turn ^= 1) {
        const Fetched group = next;
        const int following = row + gridDim.x;
        if (following < rows) next = fetch(x, residual, following, channels);
        float value[GROUP];
        unpack_group<INPUT>(group.value, value);
        if constexpr (ADD) {
            float before[GROUP];
            unpack_group<VALUES>(group.before, before);
#pragma unroll
            for (int j = 0; j < GROUP; j++) value[j] = __fadd_rn(before[j], value[j]);
            store_group<VALUES>(residual + static_cast<u64>(row) * channels, column, channels, value);
#pragma unroll
            for (int j = 0; j < GROUP; j++) value[j] = rounded<VALUES>(value[j]);
        }
        store_group<VALUES>(rows_at_hand[turn], column, channels, value);
        float mean = 0.0f;
        if constexpr (CENTRE) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < GROUP; j++) sum = __fadd_rn(sum, value[j]);
            mean = __fdiv_rn(block_sum(sum), count);
#pragma unroll
            for (int j = 0; j < GROUP; j++) value[j] = column + j < channels ? __fadd_rn(value[j], -mean) : 0.0f;
        }
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < GROUP; j++) squares = __fadd_rn(squares, __fmul_rn(value[j], value[j]));
        // The barriers of the sum also make the row in shared memory visible.
        const float inverse = rsqrtf(__fadd_rn(__fdiv_rn(block_sum(squares), count), eps));
        if (column >= width) continue;
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            value[j] = to_float<VALUES>(rows_at_hand[turn][constants.source[j]]);
            if (CENTRE) value[j] = __fadd_rn(value[j], -mean);
            value[j] = __fmul_rn(value[j], inverse);
        }
        scale_group(constants, value);
        store_results<BITS>(out, row, column, width, value);
    }
}
