"""Triton version of `static_quant`; with `GATED` also of `silu_mul` and `silu_mul_quant`.

No value depends on another column, so programs take pieces of rows: small ones while there are few rows, to spread
them over the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.ops.triton.common import (
    FEW_ROWS,
    as_rows,
    block_for,
    channel_vector,
    code_constants,
    launch,
    round_to_code,
    store_codes,
    vector_constants,
    wait_for_predecessor,
    warps_for,
)

__all__ = ["column_values", "quantize", "static_quant"]

BLOCK = 4096
BLOCK_FEW_ROWS = 1024


@triton.jit
def column_values(row, columns, inside, CHANNELS: tl.constexpr, GATED: tl.constexpr):
    """float32 values at `columns` of the row that begins at the pointer `row`; with GATED, silu(gate) * up of them."""
    value = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(row + CHANNELS + columns, mask=inside, other=0.0).to(tl.float32)
        value = value / (1.0 + tl.exp(-value)) * up
    return value


@triton.jit
def _static(
    x,
    multiplier,
    index,
    shift,
    out,
    CHANNELS: tl.constexpr,  # values of a row: its width, or half of it if GATED
    WIDTH: tl.constexpr,  # of the result
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PACKED: tl.constexpr,
    MULTIPLIER_STEP: tl.constexpr,
    SHIFT_STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    source = columns
    if index is not None:
        source = tl.load(index + columns, mask=inside, other=0)
    if multiplier is not None:
        gain = channel_vector(multiplier, columns, inside, MULTIPLIER_STEP)
    if shift is not None:
        offset = channel_vector(shift, columns, inside, SHIFT_STEP)
    wait_for_predecessor(OVERLAP)
    value = column_values(x + row * (2 * CHANNELS if GATED else CHANNELS), source, inside, CHANNELS, GATED)
    if multiplier is not None:
        value = value * gain
    if shift is not None:
        value = value + offset
    if QUANTIZE:
        place = out + row * (WIDTH // 2 if PACKED else WIDTH)
        store_codes(place, start, round_to_code(value, LOW, HIGH), WIDTH, BLOCK, PACKED)
    else:
        tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=inside)


def static_quant(
    x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int, packed: bool
) -> Tensor:
    """`static_quant` of checked arguments."""
    width = x.shape[-1] if index is None else index.shape[0]
    shape = (*x.shape[:-1], width // 2 if packed else width)
    out = torch.empty(shape, dtype=torch.uint8 if packed else torch.int8, device=x.device)
    quantize(x, multiplier, index, shift, out, width, bits, packed)
    return out


def quantize(
    x: Tensor,
    multiplier: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    width: int,
    bits: int | None,
    packed: bool = False,
    gated: bool = False,
) -> None:
    """Fill `out` with the codes of x, or of silu(gate) * up if `gated`; with bits None with their floats."""
    if out.numel() == 0:
        return
    rows = as_rows(x)
    block = block_for(width, BLOCK_FEW_ROWS if rows.shape[0] < FEW_ROWS else BLOCK)
    launch(
        _static,
        (rows.shape[0], triton.cdiv(width, block)),
        (rows, multiplier, index, shift, out),
        x.device,
        warps_for(block, rows.shape[0]),
        CHANNELS=x.shape[-1] // 2 if gated else x.shape[-1],
        WIDTH=width,
        BLOCK=block,
        GATED=gated,
        QUANTIZE=bits is not None,
        **code_constants(8 if bits is None else bits, packed),
        **vector_constants(multiplier, shift),
    )
