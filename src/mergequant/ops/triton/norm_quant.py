"""Triton version of the norms: `rmsnorm_quant`, `layernorm_quant`, `add_rmsnorm_quant` and `add_rmsnorm`.

One program per row. A row of up to `MOST_HELD` channels stays in registers between the sum of squares and the codes.
Longer rows, and gathered ones, are read a second time, from the cache that the first time filled.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.ops.triton.common import (
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

__all__ = ["add_rmsnorm", "add_rmsnorm_quant", "norm_quant"]


@triton.jit
def _sum_or_value(x, residual, columns, inside, ADD: tl.constexpr):
    """Values of the row in float32. With ADD the residual takes them first, and its rounded sum is what counts."""
    if ADD:
        total = tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    else:
        value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _emit(
    normed,
    out,
    start,
    gain,
    offset,
    SHIFTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gain, shift, and codes or floats of BLOCK columns from `start`."""
    value = normed * gain
    if SHIFTED:
        value = value + offset
    if QUANTIZE:
        store_codes(out, start, round_to_code(value, LOW, HIGH), WIDTH, BLOCK, PACKED)
    else:
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, value.to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _norm(
    x,
    residual,
    multiplier,
    index,
    shift,
    out,
    eps,
    CHANNELS: tl.constexpr,  # of the row
    WIDTH: tl.constexpr,  # of the result
    BLOCK: tl.constexpr,  # channels at once
    OUT_BLOCK: tl.constexpr,  # results at once; equals BLOCK unless channels are gathered
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,  # LayerNorm
    QUANTIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PACKED: tl.constexpr,
    MULTIPLIER_STEP: tl.constexpr,
    SHIFT_STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    GATHERED: tl.constexpr = index is not None
    SHIFTED: tl.constexpr = shift is not None
    HELD: tl.constexpr = CHANNELS <= BLOCK
    AT_ONCE: tl.constexpr = WIDTH <= OUT_BLOCK
    row = tl.program_id(0).to(tl.int64)
    x += row * CHANNELS
    if ADD:
        residual += row * CHANNELS
    out += row * (WIDTH // 2 if PACKED else WIDTH)

    targets = tl.arange(0, OUT_BLOCK)
    if not SHIFTED:
        offset = None
    if AT_ONCE:
        gain = channel_vector(multiplier, targets, targets < WIDTH, MULTIPLIER_STEP)
        if SHIFTED:
            offset = channel_vector(shift, targets, targets < WIDTH, SHIFT_STEP)
        if GATHERED:
            source = tl.load(index + targets, mask=targets < WIDTH, other=0)
    wait_for_predecessor(OVERLAP)

    columns = tl.arange(0, BLOCK)
    mean = 0.0
    if HELD:
        inside = columns < CHANNELS
        value = _sum_or_value(x, residual, columns, inside, ADD)
        if CENTRE:
            mean = tl.sum(value, 0) / CHANNELS
            value = tl.where(inside, value - mean, 0.0)
        squares = value * value
    else:
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        if CENTRE:
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, CHANNELS, BLOCK):
                total += tl.load(x + start + columns, mask=start + columns < CHANNELS, other=0.0).to(tl.float32)
            mean = tl.sum(total, 0) / CHANNELS
        for start in range(0, CHANNELS, BLOCK):
            inside = start + columns < CHANNELS
            value = _sum_or_value(x, residual, start + columns, inside, ADD)
            if CENTRE:
                value = tl.where(inside, value - mean, 0.0)
            squares += value * value
    inverse = tl.rsqrt(tl.sum(squares, 0) / CHANNELS + eps)

    if HELD and not GATHERED:
        _emit(value * inverse, out, 0, gain, offset, SHIFTED, WIDTH, BLOCK, QUANTIZE, LOW, HIGH, PACKED)
    else:
        values = x
        if ADD:
            values = residual
            tl.debug_barrier()  # other threads of the program wrote what is read now
        for start in range(0, WIDTH, OUT_BLOCK):
            places = start + targets
            known = places < WIDTH
            if not AT_ONCE:
                gain = channel_vector(multiplier, places, known, MULTIPLIER_STEP)
                if SHIFTED:
                    offset = channel_vector(shift, places, known, SHIFT_STEP)
                if GATHERED:
                    source = tl.load(index + places, mask=known, other=0)
            taken = places
            if GATHERED:
                taken = source
            again = tl.load(values + taken, mask=known, other=0.0).to(tl.float32)
            if CENTRE:
                again = again - mean
            _emit(again * inverse, out, start, gain, offset, SHIFTED, WIDTH, OUT_BLOCK, QUANTIZE, LOW, HIGH, PACKED)


def norm_quant(
    x: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
    packed: bool,
    centre: bool,
) -> Tensor:
    """`rmsnorm_quant`, or with `centre` `layernorm_quant`, of checked arguments."""
    width = x.shape[-1] if index is None else index.shape[0]
    out = _codes(x, width, packed)
    _launch(x, None, multiplier, index, shift, out, eps, bits, width, packed, centre)
    return out


def add_rmsnorm_quant(
    x: Tensor,
    residual: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
) -> Tensor:
    """`add_rmsnorm_quant` of checked arguments; updates the residual in place."""
    width = residual.shape[-1] if index is None else index.shape[0]
    out = _codes(residual, width, packed=False)
    _launch(x, residual, multiplier, index, shift, out, eps, bits, width)
    return out


def add_rmsnorm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """`add_rmsnorm` of checked arguments; updates the residual in place unless x is None."""
    out = torch.empty_like(residual)
    width = residual.shape[-1]
    values, target = (residual, None) if x is None else (x, residual)
    _launch(values, target, weight, None, bias, out, eps, None, width)
    return out


def _codes(x: Tensor, width: int, packed: bool) -> Tensor:
    stored = width // 2 if packed else width
    return torch.empty((*x.shape[:-1], stored), dtype=torch.uint8 if packed else torch.int8, device=x.device)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    eps: float,
    bits: int | None,
    width: int,
    packed: bool = False,
    centre: bool = False,
) -> None:
    """bits None: floats, else codes."""
    if out.numel() == 0:
        return
    rows = as_rows(x)
    channels = x.shape[-1]
    block = block_for(channels)
    out_block = block if index is None else block_for(width)
    launch(
        _norm,
        (rows.shape[0],),
        (rows, residual, multiplier, index, shift, out, eps),
        x.device,
        warps_for(max(block, out_block), rows.shape[0]),
        CHANNELS=channels,
        WIDTH=width,
        BLOCK=block,
        OUT_BLOCK=out_block,
        ADD=residual is not None,
        CENTRE=centre,
        QUANTIZE=bits is not None,
        **code_constants(8 if bits is None else bits, packed),
        **vector_constants(multiplier, shift),
    )
