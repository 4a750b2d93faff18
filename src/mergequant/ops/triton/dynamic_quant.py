"""Triton version of `dynamic_quant`; with `GATED` also of `silu_mul_dynamic_quant`.

One program per row: the largest magnitude, then the codes. A row of up to `MOST_HELD` values stays in registers between
the two; longer ones are read, and gated, twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops.dynamic_quant import SMALLEST_SCALE
from mergequant.ops.triton.common import (
    as_rows,
    block_for,
    code_constants,
    launch,
    quotient,
    round_to_code,
    store_codes,
    wait_for_predecessor,
    warps_for,
)
from mergequant.ops.triton.static_quant import column_values

__all__ = ["dynamic_quant", "quantize_tokens"]


@triton.jit
def _dynamic(
    x,
    out,
    scales,
    share,  # of the largest magnitude that one step is
    smallest,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HELD: tl.constexpr = WIDTH <= BLOCK
    row = tl.program_id(0).to(tl.int64)
    x += row * (2 * WIDTH if GATED else WIDTH)
    out += row * (WIDTH // 2 if PACKED else WIDTH)
    columns = tl.arange(0, BLOCK)
    wait_for_predecessor(OVERLAP)
    if HELD:
        value = column_values(x, columns, columns < WIDTH, WIDTH, GATED)
        largest = tl.max(tl.abs(value), 0)
    else:
        magnitudes = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, WIDTH, BLOCK):
            piece = column_values(x, start + columns, start + columns < WIDTH, WIDTH, GATED)
            magnitudes = tl.maximum(magnitudes, tl.abs(piece))
        largest = tl.max(magnitudes, 0)
    scale = tl.maximum(largest * share, smallest)
    tl.store(scales + row, scale)
    reciprocal = tl.div_rn(1.0, scale)
    if HELD:
        scaled = quotient(value, scale, reciprocal)
        store_codes(out, 0, round_to_code(scaled, LOW, HIGH), WIDTH, BLOCK, PACKED)
    else:
        for start in range(0, WIDTH, BLOCK):
            piece = column_values(x, start + columns, start + columns < WIDTH, WIDTH, GATED)
            scaled = quotient(piece, scale, reciprocal)
            store_codes(out, start, round_to_code(scaled, LOW, HIGH), WIDTH, BLOCK, PACKED)


def dynamic_quant(x: Tensor, clip_ratio: float, bits: int, packed: bool) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of checked arguments."""
    return quantize_tokens(x, x.shape[-1], clip_ratio, bits, packed)


def quantize_tokens(
    x: Tensor, width: int, clip_ratio: float, bits: int, packed: bool = False, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes (..., width) and scales (..., 1) of x, or of silu(gate) * up if `gated`."""
    leading = x.shape[:-1]
    stored = width // 2 if packed else width
    out = torch.empty((*leading, stored), dtype=torch.uint8 if packed else torch.int8, device=x.device)
    scales = torch.empty((*leading, 1), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, scales
    rows = as_rows(x)
    block = block_for(width)
    launch(
        _dynamic,
        (rows.shape[0],),
        (rows, out, scales, clip_ratio / IntegerGrid(bits).high, SMALLEST_SCALE),
        x.device,
        warps_for(block, rows.shape[0]),
        WIDTH=width,
        BLOCK=block,
        GATED=gated,
        **code_constants(bits, packed),
    )
    return out, scales
