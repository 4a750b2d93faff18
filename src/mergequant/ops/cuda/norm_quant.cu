// RMSNorm and LayerNorm that emit codes (or floats), alone or after the residual's addition:
//
//     v = x, or residual <- round(residual + x) and v = residual           (round: to the residual's element kind)
//     v = v - mean(v)                                                      (LayerNorm)
//     y = (v * rsqrt(mean(v^2) + eps))[index] * multiplier + shift,        code = clamp(round(y))
//
// One block a row. The row stays in registers between the sum of squares and the codes where it fits (MQ_HELD groups a
// thread); longer rows, and gathered ones, are read again, from the cache that the first time filled.
#include "elementwise.cuh"

constexpr int RESIDUAL = MQ_RESIDUAL;   // its element kind; -1: there is none
constexpr int GAIN = MQ_GAIN;           // element kind of the multiplier
constexpr bool CENTRE = MQ_CENTRE;      // LayerNorm
constexpr int HELD = MQ_HELD;           // groups of a row that a thread keeps; 0: rows are too long

constexpr bool ADD = RESIDUAL >= 0;
constexpr int VALUES = ADD ? RESIDUAL : INPUT;  // element kind of what is normed

typedef Element<INPUT> X;
typedef Element<VALUES> V;

// A group of what is normed. With ADD the residual takes the sum first, and its rounded elements are what counts.
MQ_DEVICE void take(const X* x, V* residual, int column, int channels, float (&value)[GROUP]) {
    load_group<INPUT>(x, column, channels, value);
    if constexpr (ADD) {
        float before[GROUP];
        load_group<VALUES>(residual, column, channels, before);
#pragma unroll
        for (int j = 0; j < GROUP; j++) value[j] = __fadd_rn(before[j], value[j]);
        store_group<VALUES>(residual, column, channels, value);
#pragma unroll
        for (int j = 0; j < GROUP; j++) value[j] = rounded<VALUES>(value[j]);
    }
}

// LayerNorm: values less their mean; beyond the row they stay zero.
MQ_DEVICE void centre(float mean, int column, int channels, float (&value)[GROUP]) {
    if constexpr (CENTRE) {
#pragma unroll
        for (int j = 0; j < GROUP; j++) value[j] = column + j < channels ? __fadd_rn(value[j], -mean) : 0.0f;
    }
}

MQ_DEVICE float add_up(float sum, const float (&value)[GROUP]) {
#pragma unroll
    for (int j = 0; j < GROUP; j++) sum = __fadd_rn(sum, value[j]);
    return sum;
}

MQ_DEVICE float add_squares(float sum, const float (&value)[GROUP]) {
#pragma unroll
    for (int j = 0; j < GROUP; j++) sum = __fadd_rn(sum, __fmul_rn(value[j], value[j]));
    return sum;
}

MQ_DEVICE void emit(float inverse, const Constants& constants, void* out, u64 row, int column, int width,
                    float (&value)[GROUP]) {
#pragma unroll
    for (int j = 0; j < GROUP; j++) value[j] = __fmul_rn(value[j], inverse);
    scale_group(constants, value);
    store_results<BITS>(out, row, column, width, value);
}

extern "C" __global__ void __launch_bounds__(THREADS)
norm_quant(const X* x, V* residual, const Element<GAIN>* multiplier, const i32* index, const float* shift, void* out,
           int channels, int width, float eps) {
    const u64 row = blockIdx.x;
    x += row * channels;
    if (ADD) residual += row * channels;
    Constants constants;
    load_constants<GAIN>(multiplier, shift, index, first_column(), width, constants);
    overlap_launch();
    overlap_wait();

    const float count = static_cast<float>(channels);
    float held[HELD > 0 ? HELD : 1][GROUP];
    float mean = 0.0f, squares = 0.0f;
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) take(x, residual, first_column() + i * STEP, channels, held[i]);
        if constexpr (CENTRE) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < HELD; i++) sum = add_up(sum, held[i]);
            mean = __fdiv_rn(block_sum(sum), count);
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            centre(mean, first_column() + i * STEP, channels, held[i]);
            squares = add_squares(squares, held[i]);
        }
    } else {
        float value[GROUP];
        if constexpr (CENTRE) {
            float sum = 0.0f;
            for (int column = first_column(); column < channels; column += STEP) {
                load_group<INPUT>(x, column, channels, value);
                sum = add_up(sum, value);
            }
            mean = __fdiv_rn(block_sum(sum), count);
        }
        for (int column = first_column(); column < channels; column += STEP) {
            take(x, residual, column, channels, value);
            centre(mean, column, channels, value);
            squares = add_squares(squares, value);
        }
    }
    // The sum's barriers also make the new residual of every thread visible to all of the block, which read it below.
    const float inverse = rsqrtf(__fadd_rn(__fdiv_rn(block_sum(squares), count), eps));

    if constexpr (HELD > 0 && !GATHERED) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int column = first_column() + i * STEP;
            if (i > 0) load_constants<GAIN>(multiplier, shift, index, column, width, constants);
            emit(inverse, constants, out, row, column, width, held[i]);
        }
    } else {
        const V* values = ADD ? residual : reinterpret_cast<const V*>(x);  // without ADD, V is X
        for (int column = first_column(); column < width; column += STEP) {
            float value[GROUP];
            if (column > first_column()) load_constants<GAIN>(multiplier, shift, index, column, width, constants);
            if constexpr (GATHERED) {
#pragma unroll
                for (int j = 0; j < GROUP; j++) {
                    value[j] = to_float<VALUES>(values[constants.source[j]]);
                    if (CENTRE) value[j] = __fadd_rn(value[j], -mean);
                }
            } else {
                load_group<VALUES>(values, column, width, value);
                centre(mean, column, width, value);
            }
            emit(inverse, constants, out, row, column, width, value);
        }
    }
}
