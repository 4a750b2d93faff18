// The float arithmetic behind every integer GEMM, in one place, so that all kernels and the torch reference agree bit
// for bit: int32 sum -> float, times the channel's scale, times the token's scale, plus the bias, then one rounding to
// 16 bits.
//
// `__fmul_rn` and `__fadd_rn` keep the compiler from contracting a multiply and an add into an FMA (one rounding
// instead of two).  Where a kernel has no token scale or bias it may pass 1 and 0: x * 1 is x, and x + 0 is x but for
// the sign of a zero.
#pragma once
#include "mma.cuh"

// True sum of an accumulator.  4-bit weights are multiplied as 16 w (a nibble in a byte's upper half), so the
// accumulator is an exact multiple of 16; shifting before the conversion keeps the checkpoint's own scale and rounding.
template <int WEIGHT_BITS>
MQ_DEVICE i32 exact_sum(i32 accumulator) {
    static_assert(WEIGHT_BITS == 4 || WEIGHT_BITS == 8, "tiles hold 4-bit or 8-bit weights");
    return WEIGHT_BITS == 4 ? accumulator >> 4 : accumulator;
}

MQ_DEVICE float channel_value(i32 sum, float weight_scale) { return __fmul_rn(__int2float_rn(sum), weight_scale); }

MQ_DEVICE float token_value(i32 sum, float weight_scale, float token_scale, float bias) {
    return __fadd_rn(__fmul_rn(channel_value(sum, weight_scale), token_scale), bias);
}

// silu(gate) * up.  The approximate exponential and quotient err by a few units in the last place of a float: at most
// one code, and only next to a tie.  exp overflows to infinity for gate < -88; the quotient is then 0, as it must be.
MQ_DEVICE float swiglu(float gate, float up) {
    return __fmul_rn(__fdividef(gate, 1.0f + __expf(-gate)), up);
}

// value / divisor as IEEE rounds it, with three instructions where a division takes about ten: the first fused
// multiply-add yields what value * reciprocal leaves over, without rounding, the second adds its share (Markstein 1990).
// `reciprocal` is 1 / divisor rounded to nearest; one is enough for a row.
MQ_DEVICE float quotient(float value, float divisor, float reciprocal) {
    const float first = __fmul_rn(value, reciprocal);
    return __fmaf_rn(__fmaf_rn(-divisor, first, value), reciprocal, first);
}

// Nearest code of BITS bits, two's complement, ties to even.  A NaN becomes 0, as cvt does.
template <int BITS>
MQ_DEVICE i32 code_of(float value) {
    constexpr i32 LOW = -(1 << (BITS - 1)), HIGH = (1 << (BITS - 1)) - 1;
    return max(LOW, min(HIGH, round_even(value)));
}

// Four codes as bytes, the first at the lowest address.
MQ_DEVICE u32 pack_codes(i32 a, i32 b, i32 c, i32 d) {
    const u32 low = __byte_perm(static_cast<u32>(a), static_cast<u32>(b), 0x0040);
    const u32 high = __byte_perm(static_cast<u32>(c), static_cast<u32>(d), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// Two adjacent outputs as 16-bit floats.
template <bool HALF>
MQ_DEVICE u32 pack_16bit(float low, float high) {
    return HALF ? pack_f16(low, high) : pack_bf16(low, high);
}
