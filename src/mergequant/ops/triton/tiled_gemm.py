"""Triton version of `tiled_linear` and `tiled_swiglu_quant`: the fallback where the CUDA kernels do not run.

A program takes some tokens by one or two row tiles of the weight and walks over the column tiles. A tile is read as it
lies, 4096 or 8192 contiguous bytes, and put into (k, output) order by a reshape and a permutation of its index digits
(the order of the digits is the definition in `mergequant.ops.tiles`); Triton does that through shared memory. Four-bit
codes stay 16 times too large until the sum is complete, as in the CUDA kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.ops.tiles import TILE_ROWS

__all__ = ["linear", "swiglu_quant"]

LEAST_TOKENS = 16  # rows that a dot takes at least
MOST_TOKENS = 128


@triton.jit
def _gemm(
    codes,
    tiles,
    weight_scale,
    token_scale,
    bias,
    result,
    rows,
    outputs,
    width,
    low,
    high,
    COLUMN_TILES: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """result[t, n] of TOKENS tokens and 64 TILES outputs; grid (tokens / TOKENS, outputs / (64 TILES))."""
    TILE_BYTES: tl.constexpr = 1024 * BITS
    OUTPUTS: tl.constexpr = 64 * TILES
    first = tl.program_id(1) * TILES
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inner = tl.arange(0, 128)
    tile = first + tl.arange(0, TILES)
    byte = tl.arange(0, TILE_BYTES)
    start = tile[:, None].to(tl.int64) * COLUMN_TILES * TILE_BYTES + byte[None, :]
    known = (tile * 64 < outputs)[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.int32)
    for column in range(COLUMN_TILES):
        k = column * 128 + inner
        x = tl.load(
            codes + token[:, None].to(tl.int64) * width + k[None, :],
            mask=(token < rows)[:, None] & (k < width)[None, :],
            other=0,
        )
        packed = tl.load(tiles + start + column * TILE_BYTES, mask=known, other=0)
        if BITS == 4:
            # Digits: tile, chunk, warp, g, t, i // 2, r8, byte, nibble -> k (chunk, nibble, i // 2, t, byte), row.
            pair = tl.join((packed << 4).to(tl.uint8), (packed & 0xF0).to(tl.uint8)).to(tl.int8, bitcast=True)
            digits = tl.reshape(pair, (TILES, 2, 4, 8, 4, 2, 2, 4, 2))
            weight = tl.reshape(tl.permute(digits, (1, 8, 5, 4, 7, 0, 2, 6, 3)), (128, OUTPUTS))
        else:
            # Digits: tile, step, warp, g, t, i // 2, r8, byte -> k (step, i // 2, t, byte), row (tile, warp, r8, g).
            digits = tl.reshape(packed.to(tl.int8, bitcast=True), (TILES, 4, 4, 8, 4, 2, 2, 4))
            weight = tl.reshape(tl.permute(digits, (1, 5, 4, 7, 0, 2, 6, 3)), (128, OUTPUTS))
        total += tl.dot(x, weight, out_dtype=tl.int32)
    if BITS == 4:
        total = total >> 4  # the sums are multiples of 16: exact
    n = first * 64 + tl.arange(0, OUTPUTS)
    value = total.to(tl.float32) * tl.load(weight_scale + n, mask=n < outputs, other=0.0)[None, :]
    if TOKEN_SCALE:
        value = value * tl.load(token_scale + token, mask=token < rows, other=0.0)[:, None]
    if BIAS:
        value = value + tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
    if SWIGLU:
        pairs = tl.permute(tl.reshape(value, (TOKENS, 4 * TILES, 2, 8)), (0, 1, 3, 2))
        gate, up = tl.split(pairs)
        product = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (TOKENS, 32 * TILES))
        n = first * 32 + tl.arange(0, 32 * TILES)
        outputs = outputs // 2
        # Adding and taking away 1.5 * 2^23 rounds half to even below 2^22, which the clamp ensures.
        value = (tl.minimum(tl.maximum(product, low), high) + 12582912.0) - 12582912.0
    tl.store(
        result + token[:, None].to(tl.int64) * outputs + n[None, :],
        value.to(result.dtype.element_ty),
        mask=(token < rows)[:, None] & (n < outputs)[None, :],
    )


def linear(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`tiled_linear` of checked arguments: codes (rows, width), token_scale (rows,), bias float32, all contiguous."""
    result = torch.empty((codes.shape[0], weight_scale.shape[0]), dtype=out_dtype, device=codes.device)
    _launch(codes, tiles, weight_scale, token_scale, bias, weight_bits, result, swiglu_bits=0)
    return result


def swiglu_quant(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    bits: int,
) -> Tensor:
    """`tiled_swiglu_quant` of checked arguments, as `linear` takes them."""
    result = torch.empty((codes.shape[0], weight_scale.shape[0] // 2), dtype=torch.int8, device=codes.device)
    _launch(codes, tiles, weight_scale, token_scale, bias, weight_bits, result, swiglu_bits=bits)
    return result


def _launch(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    result: Tensor,
    swiglu_bits: int,
) -> None:
    rows, width = codes.shape
    outputs = weight_scale.shape[0]
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, triton.next_power_of_2(rows)))
    tiles_each = 2 if tokens >= MOST_TOKENS else 1  # few tokens: more programs, to keep the memory busy
    grid = (triton.cdiv(rows, tokens), triton.cdiv(outputs, TILE_ROWS * tiles_each))
    half = 1 << (swiglu_bits - 1) if swiglu_bits else 0
    _gemm[grid](
        codes,
        tiles,
        weight_scale,
        weight_scale if token_scale is None else token_scale,
        weight_scale if bias is None else bias,
        result,
        rows,
        outputs,
        width,
        float(-half),
        float(half - 1),
        COLUMN_TILES=tiles.shape[1],
        BITS=weight_bits,
        TOKENS=tokens,
        TILES=tiles_each,
        TOKEN_SCALE=token_scale is not None,
        BIAS=bias is not None,
        SWIGLU=swiglu_bits > 0,
        num_warps=8 if tokens >= MOST_TOKENS else 4,
        num_stages=3,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the epilogue is defined to round twice
    )
