// Quantizers of rows, with static steps or one step a row, of values or of silu(gate) * up:
//
//     v = x, or gate / (1 + exp(-gate)) * up                  (MQ_GATED; a row is the gates, then as many ups)
//     static:   y = v[index] * multiplier + shift             code = clamp(round(y)), or y itself
//     dynamic:  step = max(max |v| * share, smallest),        code = clamp(round(v / step))
#include "elementwise.cuh"

constexpr bool GATED = MQ_GATED;

typedef Element<INPUT> X;

// Exponential and quotient are the exact ones of torch's kernels, not the fast ones of the GEMM's epilogue: memory is
// what takes the time here.
MQ_DEVICE float silu_times(float gate, float up) {
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate))), up);
}

// Values at column .. column + 7 of a row of `channels` values.
MQ_DEVICE void take(const X* row, int column, int channels, float (&value)[GROUP]) {
    load_group<INPUT>(row, column, channels, value);
    if constexpr (GATED) {
        float up[GROUP];
        load_group<INPUT>(row + channels, column, channels, up);
#pragma unroll
        for (int j = 0; j < GROUP; j++) value[j] = silu_times(value[j], up[j]);
    }
}

#if !MQ_DYNAMIC
// Block (x, y) has the columns of chunk y in rows x, x + gridDim.x, ..: what belongs to a column is read once.
extern "C" __global__ void __launch_bounds__(THREADS)
static_quant(const X* x, const float* multiplier, const i32* index, const float* shift, void* out, int rows,
             int channels, int width) {
    const int column = first_column() + static_cast<int>(blockIdx.y) * STEP;
    Constants constants;
    load_constants<FLOAT32>(multiplier, shift, index, column, width, constants);
    overlap_launch();
    overlap_wait();
    if (column >= width) return;
    const u64 pitch = static_cast<u64>(channels) * (GATED ? 2 : 1);
    for (u32 row = blockIdx.x; row < static_cast<u32>(rows); row += gridDim.x) {
        const X* from = x + row * pitch;
        float value[GROUP];
        if constexpr (GATHERED) {
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                value[j] = to_float<INPUT>(from[constants.source[j]]);
                if (GATED) value[j] = silu_times(value[j], to_float<INPUT>(from[channels + constants.source[j]]));
            }
        } else {
            take(from, column, channels, value);
        }
        scale_group(constants, value);
        store_results<BITS>(out, row, column, width, value);
    }
}
#else
constexpr int HELD = MQ_HELD;  // groups of a row that a thread keeps; 0: rows are too long

MQ_DEVICE float largest_of(float largest, const float (&value)[GROUP]) {
#pragma unroll
    for (int j = 0; j < GROUP; j++) largest = fmaxf(largest, fabsf(value[j]));
    return largest;
}

MQ_DEVICE void emit(float step, float reciprocal, void* out, u64 row, int column, int width, float (&value)[GROUP]) {
#pragma unroll
    for (int j = 0; j < GROUP; j++) value[j] = quotient(value[j], step, reciprocal);
    store_results<BITS>(out, row, column, width, value);
}

// One block a row. It stays in registers between its largest magnitude and the codes, or is read, and gated, twice.
extern "C" __global__ void __launch_bounds__(THREADS)
dynamic_quant(const X* x, void* out, float* steps, int width, float share, float smallest) {
    const u64 row = blockIdx.x;
    x += row * width * (GATED ? 2 : 1);
    overlap_launch();
    overlap_wait();
    float held[HELD > 0 ? HELD : 1][GROUP];
    float largest = 0.0f;
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            take(x, first_column() + i * STEP, width, held[i]);
            largest = largest_of(largest, held[i]);
        }
    } else {
        for (int column = first_column(); column < width; column += STEP) {
            take(x, column, width, held[0]);
            largest = largest_of(largest, held[0]);
        }
    }
    const float step = fmaxf(__fmul_rn(block_maximum(largest), share), smallest);
    const float reciprocal = __frcp_rn(step);
    if (threadIdx.x == 0) steps[row] = step;
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            emit(step, reciprocal, out, row, first_column() + i * STEP, width, held[i]);
        }
    } else {
        for (int column = first_column(); column < width; column += STEP) {
            take(x, column, width, held[0]);
            emit(step, reciprocal, out, row, column, width, held[0]);
        }
    }
}
#endif
