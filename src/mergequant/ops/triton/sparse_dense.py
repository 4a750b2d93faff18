"""Triton versions of `sparse_dense_linear` for few tokens, and of decoding its weight for many.

`linear` reads codes and outliers as they are stored.

A program makes some outputs of one token. Inside a group the scale is common, so a group costs a sum of code * x, a sum
of x, and then one multiplication each: sum (code - zero) * scale * x = scale * (sum code * x - zero * sum x). Two codes
share a byte; their inputs, of even and of odd columns, are loaded apart, so nothing is shuffled. All sums are float32.

`decode` writes the weight in stored order of its columns, bit for bit what the reference makes and rounds: a sweep over
all codes, then one over the outliers, which make their value anew and add to it before it is rounded.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.grids.bitstream import stream_width
from mergequant.ops.triton.common import launch, wait_for_predecessor

__all__ = ["decode", "linear"]

BLOCK_ROWS = 8
GROUPS_COLUMNS = 512  # columns of a step along the row, about
BLOCK_OUTLIERS = 32
WARPS = 4
LOWEST = -8  # code that 0 stands for
DECODED = 2048  # columns of a row that a program of `decode` takes


@triton.jit
def _linear(
    x,
    codes,
    scale,
    zero,
    statistics,
    order,
    pointers,
    columns,
    values,
    bias,
    out,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,  # bytes of a group
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_OUTLIERS: tl.constexpr,
    TILE: tl.constexpr,
    LOWEST: tl.constexpr,
):
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < OUTPUTS
    wide = rows.to(tl.int64)
    entry = x + token * WIDTH
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    pair = tl.arange(0, HALF)
    for start in range(0, GROUPS, BLOCK_GROUPS):
        group = start + tl.arange(0, BLOCK_GROUPS)
        known = group < GROUPS
        places = group[:, None] * HALF + pair[None, :]  # bytes of a row (BLOCK_GROUPS, HALF)
        exists = (known[:, None]) & (pair[None, :] < HALF)
        even = 2 * places
        odd = even + 1
        if order is not None:
            even = tl.load(order + even, mask=exists, other=0).to(tl.int32) & 0xFFFF
            odd = tl.load(order + odd, mask=exists, other=0).to(tl.int32) & 0xFFFF
        first = tl.load(entry + even, mask=exists, other=0.0).to(tl.float32)
        second = tl.load(entry + odd, mask=exists, other=0.0).to(tl.float32)
        sums = tl.sum(first + second, axis=1)  # (BLOCK_GROUPS,)
        at = wide[:, None, None] * (WIDTH // 2) + places[None, :, :]
        both = tl.load(codes + at, mask=inside[:, None, None] & exists[None, :, :], other=0).to(tl.int32)
        products = (both & 15).to(tl.float32) * first[None, :, :] + (both >> 4).to(tl.float32) * second[None, :, :]
        products = tl.sum(products, axis=2)  # (BLOCK_ROWS, BLOCK_GROUPS)
        where = wide[:, None] * GROUPS + group[None, :]
        valid = inside[:, None] & known[None, :]
        if statistics is not None:
            levels = tl.load(scale + where, mask=valid, other=0).to(tl.int32)
            grid = statistics + ((wide // TILE)[:, None] * GROUPS + group[None, :]) * 4
            step = tl.load(grid, mask=valid, other=0.0).to(tl.float32)
            step = step * ((levels & 15).to(tl.float32) - tl.load(grid + 1, mask=valid, other=0.0).to(tl.float32))
            middle = tl.load(grid + 2, mask=valid, other=0.0).to(tl.float32)
            middle = middle * ((levels >> 4).to(tl.float32) - tl.load(grid + 3, mask=valid, other=0.0).to(tl.float32))
        else:
            step = tl.load(scale + where, mask=valid, other=0.0).to(tl.float32)
            middle = tl.zeros_like(step)
            if zero is not None:
                middle = tl.load(zero + where, mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(step * (products - (middle - LOWEST) * sums[None, :]), axis=1)
    if pointers is not None:
        begin = tl.load(pointers + rows, mask=inside, other=0)
        length = tl.load(pointers + rows + 1, mask=inside, other=0) - begin
        for start in range(0, tl.max(length, axis=0), BLOCK_OUTLIERS):
            number = start + tl.arange(0, BLOCK_OUTLIERS)
            valid = number[None, :] < length[:, None]
            at = begin[:, None] + number[None, :]
            column = tl.load(columns + at, mask=valid, other=0).to(tl.int32) & 0xFFFF
            value = tl.load(values + at, mask=valid, other=0.0).to(tl.float32)
            total += tl.sum(value * tl.load(entry + column, mask=valid, other=0.0).to(tl.float32), axis=1)
    if bias is not None:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * OUTPUTS + rows, total.to(out.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    statistics: Tensor | None,
    order: Tensor | None,
    pointers: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    tile: int,
) -> Tensor:
    """`sparse_dense_linear` of checked arguments with codes of 4 bits."""
    outputs, width, groups = codes.shape[0], x.shape[-1], scale.shape[1]
    flat = x.reshape(-1, width).contiguous()
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    half = width // groups // 2
    block_groups = min(triton.next_power_of_2(groups), max(GROUPS_COLUMNS // (2 * half), 1))
    parts = (codes, scale, zero, statistics, order, pointers, columns, values, bias)
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        _linear[triton.cdiv(outputs, BLOCK_ROWS), flat.shape[0]](
            flat,
            *(None if part is None else part.contiguous() for part in parts),
            out,
            OUTPUTS=outputs,
            WIDTH=width,
            GROUPS=groups,
            HALF=half,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_GROUPS=block_groups,
            BLOCK_OUTLIERS=BLOCK_OUTLIERS,
            TILE=max(tile, 1),
            LOWEST=LOWEST,
            num_warps=WARPS,
        )
    return out


@triton.jit
def _statistics(scale, zero, statistics, row, groups, valid, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """float32 scales and zero points of groups of a row (int64), by the reference's very operations."""
    at = row * GROUPS + groups
    if statistics is not None:
        levels = tl.load(scale + at, mask=valid, other=0).to(tl.int32)
        grid = statistics + ((row // TILE) * GROUPS + groups) * 4
        step = (levels & 15).to(tl.float32) - tl.load(grid + 1, mask=valid, other=0.0).to(tl.float32)
        step = tl.load(grid, mask=valid, other=0.0).to(tl.float32) * step
        middle = (levels >> 4).to(tl.float32) - tl.load(grid + 3, mask=valid, other=0.0).to(tl.float32)
        middle = tl.load(grid + 2, mask=valid, other=0.0).to(tl.float32) * middle
    else:
        step = tl.load(scale + at, mask=valid, other=0.0).to(tl.float32)
        middle = tl.zeros_like(step)
        if zero is not None:
            middle = tl.load(zero + at, mask=valid, other=0.0).to(tl.float32)
    return step, middle


@triton.jit
def _code(codes, row, places, valid, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Codes at stored columns of a row, 0 for the lowest."""
    bit = places * BITS
    byte = bit >> 3
    stored = tl.load(codes + row * BYTES + byte, mask=valid, other=0).to(tl.int32)
    if 8 % BITS != 0:
        more = tl.load(codes + row * BYTES + byte + 1, mask=valid & (byte + 1 < BYTES), other=0).to(tl.int32)
        stored = stored | (more << 8)
    return (stored >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit
def _decode(
    codes,
    scale,
    zero,
    statistics,
    out,
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    PIECE: tl.constexpr,  # columns, of which a group has a whole number of pieces
    PIECES: tl.constexpr,  # of a program
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pieces = tl.program_id(1) * PIECES + tl.arange(0, PIECES)
    known = pieces * PIECE < WIDTH
    wait_for_predecessor(OVERLAP)
    step, middle = _statistics(scale, zero, statistics, row, pieces * PIECE // (WIDTH // GROUPS), known, GROUPS, TILE)
    places = pieces[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    if BITS == 4 and PIECE > 1:  # a byte is read once
        half = pieces[:, None] * (PIECE // 2) + tl.arange(0, PIECE // 2)[None, :]
        both = tl.load(codes + row * BYTES + half, mask=known[:, None], other=0).to(tl.int32)
        code = tl.reshape(tl.join(both & 15, both >> 4), (PIECES, PIECE))
    else:
        code = _code(codes, row, places, known[:, None], BYTES, BITS)
    value = ((code + LOWEST).to(tl.float32) - middle[:, None]) * step[:, None]
    tl.store(out + row * WIDTH + places, value.to(out.dtype.element_ty), mask=known[:, None])


@triton.jit
def _add_outliers(
    codes,
    scale,
    zero,
    statistics,
    places_of,
    pointers,
    columns,
    values,
    out,
    COUNT: tl.constexpr,  # whole columns; 0: single values
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    TAKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wait_for_predecessor(OVERLAP)
    if COUNT > 0:
        begin = row * COUNT
        end = begin + COUNT
    else:
        begin = tl.load(pointers + row).to(tl.int64)
        end = tl.load(pointers + row + 1).to(tl.int64)
    for start in range(begin, end, TAKEN):
        number = start + tl.arange(0, TAKEN)
        valid = number < end
        named = number - begin if COUNT > 0 else number
        places = tl.load(columns + named, mask=valid, other=0).to(tl.int32) & 0xFFFF
        if places_of is not None:
            places = tl.load(places_of + places, mask=valid, other=0).to(tl.int32)
        groups = places // (WIDTH // GROUPS)
        step, middle = _statistics(scale, zero, statistics, row, groups, valid, GROUPS, TILE)
        code = _code(codes, row, places, valid, BYTES, BITS) + LOWEST
        value = (code.to(tl.float32) - middle) * step
        value += tl.load(values + number, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + row * WIDTH + places, value.to(out.dtype.element_ty), mask=valid)


def decode(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    statistics: Tensor | None,
    places: Tensor | None,
    pointers: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    bits: int,
    tile: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (outputs, width) in stored order; `places`: the stored position of each column, None = its own."""
    outputs, groups = codes.shape[0], scale.shape[1]
    out = torch.empty((outputs, width), dtype=dtype, device=codes.device)
    constants = {
        "WIDTH": width,
        "BYTES": stream_width(width, bits),
        "GROUPS": groups,
        "TILE": max(tile, 1),
        "BITS": bits,
        "LOWEST": IntegerGrid(bits).low,
    }
    dense = (codes, scale, zero, statistics)
    group = width // groups
    piece = min(group & -group, DECODED)  # the largest power of two that divides it
    pieces = min(DECODED // piece, triton.next_power_of_2(width // piece))
    launch(
        _decode,
        (outputs, triton.cdiv(width, piece * pieces)),
        (*dense, out),
        codes.device,
        WARPS,
        **constants,
        PIECE=piece,
        PIECES=pieces,
    )
    if columns is not None and columns.shape[0]:
        count = columns.shape[0] if pointers is None else 0
        launch(
            _add_outliers,
            (outputs,),
            (*dense, places, pointers, columns, values, out),
            codes.device,
            1,
            COUNT=count,
            **constants,
            TAKEN=BLOCK_OUTLIERS,
        )
    return out
