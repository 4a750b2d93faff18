"""Triton versions of `codebook_linear` for few tokens, and of decoding its weight for many.

For few tokens indices are read once, vectors gathered from the books.

A program takes some vectors of outputs and a stretch of columns of one part for one token, and writes its share of the
sum; shares are added in a fixed order afterwards, so the result is the same on every run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.grids.codebook import vectors_for
from mergequant.ops.triton.common import as_rows, launch, wait_for_predecessor

__all__ = ["codebook_linear", "decode"]

TILE = 2048  # weights that a program decodes at a time
LEAST_COLUMNS, MOST_COLUMNS = 32, 128  # of a tile
PROGRAMS = 1024  # enough to fill a large GPU; columns are split until there are about as many
WARPS = 4
OUTLIERS_AT_ONCE = 32
DECODED = 2048  # values that a program of `decode` writes, about


@triton.jit
def _part(
    x,
    words,
    book,
    order,
    shares,
    first_column,
    first_share,
    STRETCH: tl.constexpr,  # columns that a program walks over
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    VECTORS: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_BLOCK: tl.constexpr,  # a power of two that holds a vector
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS_OF_GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    TAKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, VECTOR_BLOCK)
    begin = tl.program_id(1) * STRETCH
    total = tl.zeros((ROWS, VECTOR_BLOCK), tl.float32)
    wait_for_predecessor(OVERLAP)
    for start in range(0, STRETCH, TAKEN):
        columns = begin + start + tl.arange(0, TAKEN)
        alive = columns < tl.minimum(begin + STRETCH, COLUMNS)
        source = first_column + columns
        if order is not None:
            source = tl.load(order + source, mask=alive, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(x + token * WIDTH + source, mask=alive, other=0.0).to(tl.float32)
        inside = (rows < VECTORS)[:, None] & alive[None, :]
        symbol = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        bit = symbol * (BITS + RESIDUAL_BITS)
        word = bit >> 5
        low = tl.load(words + word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
        high = tl.load(words + word + 1, mask=inside & (word + 1 < WORDS), other=0).to(tl.int64)
        both = (low | (high << 32)) >> (bit & 31)
        base = (columns // COLUMNS_OF_GROUP * ENTRIES).to(tl.int64)[None, :]
        held = inside[:, :, None] & (lane < VECTOR)[None, None, :]
        entry = (both & ((1 << BITS) - 1)) + base
        weight = tl.load(book + entry[:, :, None] * VECTOR + lane[None, None, :], mask=held, other=0.0).to(tl.float32)
        if RESIDUAL_BITS > 0:
            second = ((both >> BITS) & ((1 << RESIDUAL_BITS) - 1)) + base + (1 << BITS)
            more = tl.load(book + second[:, :, None] * VECTOR + lane[None, None, :], mask=held, other=0.0)
            weight = weight + more.to(tl.float32)
        total += tl.sum(weight * value[None, :, None], axis=1)
    outputs = rows[:, None] * VECTOR + lane[None, :]
    place = (first_share + tl.program_id(1)).to(tl.int64) * tl.num_programs(2) + token
    tl.store(shares + place * OUTPUTS + outputs, total, mask=(lane < VECTOR)[None, :] & (outputs < OUTPUTS))


@triton.jit
def _single(
    x,
    pointers,
    columns,
    values,
    shares,
    share,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TAKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, token = tl.program_id(0), tl.program_id(1)
    wait_for_predecessor(OVERLAP)
    begin, end = tl.load(pointers + row), tl.load(pointers + row + 1)
    total = tl.zeros((TAKEN,), tl.float32)
    for start in range(begin, end, TAKEN):
        place = start + tl.arange(0, TAKEN)
        alive = place < end
        column = tl.load(columns + place, mask=alive, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(values + place, mask=alive, other=0.0).to(tl.float32)
        total += value * tl.load(x + token * WIDTH + column, mask=alive, other=0.0).to(tl.float32)
    place = tl.num_programs(1).to(tl.int64) * share + token
    tl.store(shares + place * OUTPUTS + row, tl.sum(total))


def codebook_linear(
    x: Tensor,
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    bias: Tensor | None,
    outputs: int,
) -> Tensor:
    """`codebook_linear` of checked arguments."""
    rows = as_rows(x)
    tokens, width = rows.shape
    plans = [_cut(columns, book.shape[2], outputs, tokens) for columns, book in zip(layout[::3], books)]
    count = sum(plan[2] for plan in plans) + bool(outliers)
    shares = torch.empty((count, tokens, outputs), dtype=torch.float32, device=x.device)
    first_column = first_share = 0
    for number, (words, book) in enumerate(zip(indices, books)):
        columns, bits, residual_bits = layout[3 * number : 3 * number + 3]
        block_rows, taken, splits = plans[number]
        groups, entries, vector = book.shape
        vectors = vectors_for(outputs, vector)
        launch(
            _part,
            (triton.cdiv(vectors, block_rows), splits, tokens),
            (rows, words, book, order, shares, first_column, first_share),
            x.device,
            WARPS,
            STRETCH=taken * triton.cdiv(triton.cdiv(columns, splits), taken),
            WIDTH=width,
            COLUMNS=columns,
            OUTPUTS=outputs,
            VECTORS=vectors,
            VECTOR=vector,
            VECTOR_BLOCK=triton.next_power_of_2(vector),
            BITS=bits,
            RESIDUAL_BITS=residual_bits,
            ENTRIES=entries,
            COLUMNS_OF_GROUP=columns // groups,
            WORDS=words.shape[0],
            ROWS=block_rows,
            TAKEN=taken,
        )
        first_column += columns
        first_share += splits
    if outliers:
        launch(
            _single,
            (outputs, tokens),
            (rows, *outliers, shares, first_share),
            x.device,
            1,
            WIDTH=width,
            OUTPUTS=outputs,
            TAKEN=OUTLIERS_AT_ONCE,
        )
    total = shares.sum(0)
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).reshape(*x.shape[:-1], outputs)


def _cut(columns: int, vector: int, outputs: int, tokens: int) -> tuple[int, int, int]:
    """Vectors and columns of a tile, and stretches that the columns are split into."""
    block = triton.next_power_of_2(vector)
    taken = min(MOST_COLUMNS, max(LEAST_COLUMNS, triton.next_power_of_2(columns)))
    rows = max(1, min(TILE // (taken * block), triton.next_power_of_2(vectors_for(outputs, vector))))
    programs = triton.cdiv(vectors_for(outputs, vector), rows) * tokens
    splits = max(1, min(triton.cdiv(columns, taken), PROGRAMS // max(programs, 1)))
    stretch = taken * triton.cdiv(triton.cdiv(columns, splits), taken)
    return rows, taken, triton.cdiv(columns, stretch)


@triton.jit
def _decode(
    words,
    book,
    out,
    first_column,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS_OF_GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    TAKEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TAKEN + tl.arange(0, TAKEN)
    lane = tl.arange(0, VECTOR_BLOCK)
    alive = columns < COLUMNS
    held = (lane < VECTOR)[None, :] & alive[:, None]
    wait_for_predecessor(OVERLAP)
    bit = (row * COLUMNS + columns) * (BITS + RESIDUAL_BITS)
    word = bit >> 5
    low = tl.load(words + word, mask=alive, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(words + word + 1, mask=alive & (word + 1 < WORDS), other=0).to(tl.int64)
    both = (low | (high << 32)) >> (bit & 31)
    base = (columns // COLUMNS_OF_GROUP * ENTRIES).to(tl.int64)
    entry = (both & ((1 << BITS) - 1)) + base
    weight = tl.load(book + entry[:, None] * VECTOR + lane[None, :], mask=held, other=0.0).to(tl.float32)
    if RESIDUAL_BITS > 0:
        second = ((both >> BITS) & ((1 << RESIDUAL_BITS) - 1)) + base + (1 << BITS)
        weight += tl.load(book + second[:, None] * VECTOR + lane[None, :], mask=held, other=0.0).to(tl.float32)
    outputs = row * VECTOR + lane
    inside = ((lane < VECTOR) & (outputs < OUTPUTS))[:, None] & alive[None, :]
    place = outputs[:, None] * WIDTH + first_column + columns[None, :]
    tl.store(out + place, tl.trans(weight).to(out.dtype.element_ty), mask=inside)


def decode(
    indices: Sequence[Tensor], books: Sequence[Tensor], layout: Sequence[int], outputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight (outputs, width) in stored order, without outliers."""
    width = sum(layout[::3])
    out = torch.empty((outputs, width), dtype=dtype, device=books[0].device)
    first_column = 0
    for number, (words, book) in enumerate(zip(indices, books)):
        columns, bits, residual_bits = layout[3 * number : 3 * number + 3]
        groups, entries, vector = book.shape
        block = triton.next_power_of_2(vector)
        taken = max(LEAST_COLUMNS, min(DECODED // block, triton.next_power_of_2(columns)))
        launch(
            _decode,
            (vectors_for(outputs, vector), triton.cdiv(columns, taken)),
            (words, book, out, first_column),
            out.device,
            WARPS,
            WIDTH=width,
            COLUMNS=columns,
            OUTPUTS=outputs,
            VECTOR=vector,
            VECTOR_BLOCK=block,
            BITS=bits,
            RESIDUAL_BITS=residual_bits,
            ENTRIES=entries,
            COLUMNS_OF_GROUP=columns // groups,
            WORDS=words.shape[0],
            TAKEN=taken,
        )
        first_column += columns
    return out
