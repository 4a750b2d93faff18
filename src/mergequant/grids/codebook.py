"""Codebooks: weights as indices of any width into tables of short vectors, packed without a gap.

A vector lies along the output dimension of one column ("VPTQ", arXiv 2409.17066, section 3.1). Consecutive columns, in
an order that is stored where it is not the natural one, make a part; a part has one table (book) for each of `groups`
equal runs of its columns. With a residual book, a vector is the sum of two entries. One value per vector and one group
per column give a level table for every column (CMPQ, arXiv 2410.13056).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.grids.bitstream import pack_stream, stream_width, unpack_stream
from mergequant.grids.outliers import Outliers

__all__ = [
    "LARGEST_INDEX_BITS",
    "CodebookTensor",
    "CodedColumns",
    "decode_columns",
    "pack_indices",
    "packed_words",
    "unpack_indices",
]

WORD_BITS, WORD_BYTES = 32, 4
LARGEST_INDEX_BITS = 16  # of one index; with its residual, a symbol has up to 32
BOOK_BITS = ORDER_BITS = 16


def packed_words(count: int, bits: int) -> int:
    """int32 words that `count` symbols of `bits` bits take."""
    return -(-count * bits // WORD_BITS)


def pack_indices(symbols: Tensor, bits: int) -> Tensor:
    """Symbols of any width as one stream of bits, lowest bit first, that crosses the borders of words.

    Args:
        symbols: integers of any shape, each in 0 .. 2^bits - 1; they are taken row by row.
        bits: 1..32.

    Returns:
        int32 (words,).

    Raises:
        KernelError: a width or a symbol out of range.
    """
    stream = pack_stream(symbols.reshape(-1), bits)
    words = packed_words(symbols.numel(), bits)
    return torch.nn.functional.pad(stream, (0, words * WORD_BYTES - stream.shape[0])).view(torch.int32)


def unpack_indices(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_indices`: int64 (count,).

    Raises:
        KernelError: a width out of range, or words of another number of symbols.
    """
    if words.shape != (packed_words(count, bits),):
        raise KernelError(f"{count} indices of {bits} bits take {packed_words(count, bits)} words, not {words.shape}")
    return unpack_stream(words.contiguous().view(torch.uint8)[: stream_width(count, bits)], count, bits).long()


def decode_columns(symbols: Tensor, book: Tensor, bits: int, residual_bits: int, outputs: int) -> Tensor:
    """Weights (outputs, columns) in the dtype of the book.

    Args:
        symbols: integers (vectors, columns): residual index << bits | index.
        book: float (groups, 2^bits + residual entries, vector).
        bits, residual_bits: widths of the two indices; residual_bits 0 = no second one.
        outputs: rows; those beyond, up to vectors * vector, are padding.
    """
    groups, entries, vector = book.shape
    columns = symbols.shape[1]
    group = torch.arange(columns, device=book.device) // max(columns // groups, 1)
    flat, base = book.reshape(-1, vector), group * entries
    values = flat[(symbols & (1 << bits) - 1) + base]  # (vectors, columns, vector)
    if residual_bits:
        values = values + flat[(symbols >> bits) + base + (1 << bits)]
    return values.transpose(1, 2).reshape(-1, columns)[:outputs]


@dataclass(frozen=True)
class CodedColumns:
    """A part of a weight: consecutive columns that share width, vector length and books.

    Attributes:
        symbols: int64 (vectors, columns).
        book: float16 (groups, entries, vector).
        bits, residual_bits: widths of the indices.
    """

    symbols: Tensor
    book: Tensor
    bits: int
    residual_bits: int = 0

    @property
    def columns(self) -> int:
        """Columns of the part."""
        return self.symbols.shape[1]

    def decode(self, outputs: int) -> Tensor:
        """float32 (outputs, columns)."""
        return decode_columns(self.symbols, self.book.float(), self.bits, self.residual_bits, outputs)

    def packed(self) -> Tensor:
        """The symbols as a checkpoint stores them, int32 (words,)."""
        return pack_indices(self.symbols, self.bits + self.residual_bits)

    @property
    def book_bits(self) -> int:
        """Stored bits of the books."""
        return BOOK_BITS * self.book.numel()

    @property
    def index_bits(self) -> int:
        """Stored bits of the indices, whole words."""
        return WORD_BITS * packed_words(self.symbols.numel(), self.bits + self.residual_bits)


@dataclass(frozen=True)
class CodebookTensor:
    """A matrix (outputs, width) in codebooks.

    Attributes:
        parts: columns in stored order.
        outputs: rows.
        order: int64 (width,), original column of each position; None = the natural order.
        outliers: what is added, at original columns; None = nothing.
    """

    parts: tuple[CodedColumns, ...]
    outputs: int
    order: Tensor | None = None
    outliers: Outliers | None = None

    @property
    def width(self) -> int:
        """Columns."""
        return sum(part.columns for part in self.parts)

    def decode(self) -> Tensor:
        """float32 (outputs, width), columns in natural order."""
        stored = torch.cat([part.decode(self.outputs) for part in self.parts], 1)
        natural = stored
        if self.order is not None:
            natural = torch.empty_like(stored)
            natural[:, self.order] = stored
        return natural if self.outliers is None else self.outliers.add_to(natural)

    def stored_bits(self) -> int:
        """Bits of indices, books, order and outliers, as they are stored."""
        rest = 0 if self.order is None else ORDER_BITS * self.order.numel()
        rest += 0 if self.outliers is None else self.outliers.bits
        return rest + sum(part.index_bits + part.book_bits for part in self.parts)

    def bits_per_element(self) -> float:
        """Stored bits per weight, all of them."""
        return self.stored_bits() / (self.outputs * self.width)

    @property
    def oversized(self) -> bool:
        """Whether the books take more room than the indices that point into them."""
        return sum(part.book_bits for part in self.parts) > sum(part.index_bits for part in self.parts)


def vectors_for(outputs: int, vector: int) -> int:
    """Vectors that cover `outputs` rows, the last one padded."""
    return math.ceil(outputs / vector)
