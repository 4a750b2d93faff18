"""Launch of `codebook.cu`: weights in codebooks, for a few tokens, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergequant.grids.codebook import vectors_for
from mergequant.ops.cuda.arrange import CHUNK, COLUMNS, LARGEST_WIDTH, SHARED, arrange
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel, multiprocessors

__all__ = ["Part", "cluster_for", "linear", "reason_against", "unit"]

TILE = 16  # rows of indices that a block takes at a time
MOST_TOKENS = 8  # of a launch: more take several
SUM_ROW = 20  # words of 16 sums, as in half.cuh
MOST_VECTOR = 16
INDEX_STEP = 4  # bits of an index and its residual index together are a multiple of it
SMALL_BOOKS = 96 * 1024  # bytes of copies of the books: lanes with a copy of their own do not meet in a bank
BANKS = 128  # bytes that shared memory serves at once
PROCESSORS_TOGETHER = 16  # multiprocessors of which a cluster takes its blocks
MOST_BLOCKS = 8  # of a cluster
OVERHEAD = 2  # chunks of columns that beginning and ending a tile are worth
WARPS = ((4, 16), (6, 12), (MOST_VECTOR, 8))  # of a block, for vectors up to a length: long ones need more registers


@dataclass(frozen=True)
class Part:
    """One part of a weight, and the tokens of a launch."""

    columns: int
    bits: int
    residual_bits: int
    groups: int
    entries: int
    vector: int
    tokens: int

    @property
    def room(self) -> int:
        """Bytes of an entry in shared memory."""
        size = 2 * self.vector
        return 4 if size <= 4 else 8 if size <= 8 else -(-size // 16) * 16

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return next(warps for longest, warps in WARPS if self.vector <= longest)

    @property
    def copies(self) -> int:
        """Copies of the books in shared memory; 0: they stay in global memory."""
        size = self.groups * self.entries * self.room
        if size + self.sums > SHARED:
            return 0
        copies = 1
        while 2 * copies * self.room <= BANKS and 2 * copies * size <= min(SMALL_BOOKS, SHARED - self.sums):
            copies *= 2
        return copies

    @property
    def sums(self) -> int:
        """Bytes of shared memory for sums of a tile: of all warps, and two to share with the cluster."""
        return 4 * self.vector * self.tokens * (self.warps * SUM_ROW + 2 * TILE)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.copies * self.groups * self.entries * self.room + self.sums


@cache
def cluster_for(tiles: int, chunks: int, processors: int) -> tuple[int, int]:
    """Blocks that share the columns of a tile, and clusters of them that run side by side, for the least time."""
    best = (0, 1, 1)
    for blocks in range(1, min(MOST_BLOCKS, chunks) + 1):
        clusters = processors // PROCESSORS_TOGETHER * (PROCESSORS_TOGETHER // blocks) if blocks > 1 else processors
        if clusters < 1:
            break
        time = -(-tiles // clusters) * (-(-chunks // blocks) + OVERHEAD)
        if blocks == 1 or time < best[0]:
            best = (time, blocks, min(clusters, tiles))
    return best[1], best[2]


def reason_against(x: Tensor, books: Sequence[Tensor], layout: Sequence[int], outliers: Sequence[Tensor]) -> str | None:
    """Why the kernel does not take these arguments; None if it does."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 and float16, not {x.dtype}"
    if outliers:
        return "the CUDA kernel reads no outliers"
    if x.shape[-1] > LARGEST_WIDTH:
        return f"a row of {x.shape[-1]} inputs does not fit the CUDA kernel's shared memory"
    for number, book in enumerate(books):
        columns, bits, residual_bits = layout[3 * number : 3 * number + 3]
        groups, _, vector = book.shape
        if vector % 2 or vector > MOST_VECTOR:
            return f"the CUDA kernel reads vectors of an even length up to {MOST_VECTOR}, not {vector}"
        if (bits + residual_bits) % INDEX_STEP:
            return f"the CUDA kernel reads indices of a multiple of {INDEX_STEP} bits, not {bits + residual_bits}"
        if columns % COLUMNS or columns // groups % COLUMNS:
            return f"the CUDA kernel wants a multiple of {COLUMNS} columns in a book, not {columns // groups}"
    return None


@cache
def unit(part: Part, cluster: int, half: bool) -> Unit:
    """What is compiled; `half`: results are float16, else bfloat16."""
    return Unit(
        "codebook.cu",
        (
            ("MQ_TOKENS", part.tokens),
            ("MQ_VECTOR", part.vector),
            ("MQ_BITS", part.bits),
            ("MQ_RESIDUAL", part.residual_bits),
            ("MQ_ENTRIES", part.groups * part.entries),
            ("MQ_OF_GROUP", part.entries),
            ("MQ_COPIES", part.copies),
            ("MQ_CLUSTER", cluster),
            ("MQ_WARPS", part.warps),
            ("MQ_HALF", int(half)),
        ),
    )


def linear(
    x: Tensor,
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    *,
    cluster: int | None = None,
) -> Tensor:
    """`codebook_linear` of checked arguments that `reason_against` has nothing against; `cluster`: for measurements.

    Raises:
        KernelError: the kernel cannot be compiled or launched.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width).contiguous()
    count = rows.shape[0]
    tokens = min(MOST_TOKENS, 1 << max(count - 1, 0).bit_length())
    result = torch.empty((count, outputs), dtype=x.dtype, device=x.device)
    sums = torch.empty((count, outputs), dtype=torch.float32, device=x.device) if len(books) > 1 else None
    # All that may launch something comes before `arrange`: the kernel reads it early.
    offset = None if bias is None else bias.float().contiguous()
    stored = [(_aligned(words), _aligned(book)) for words, book in zip(indices, books)]
    inputs = arrange(rows, None if order is None else _aligned(order), tokens, False)
    first_column = 0
    for number, book in enumerate(books):
        columns, bits, residual_bits = layout[3 * number : 3 * number + 3]
        groups, entries, vector = book.shape
        part = Part(columns, bits, residual_bits, groups, entries, vector, tokens)
        tiles, chunks = -(-vectors_for(outputs, vector) // TILE), -(-columns // CHUNK)
        blocks, clusters = cluster_for(tiles, chunks, multiprocessors(x.device))
        if cluster is not None:
            blocks, clusters = cluster, min(tiles, multiprocessors(x.device) // cluster)
        made = kernel(unit(part, blocks, x.dtype == torch.float16), "codebook", x.device)
        last = number == len(books) - 1
        for start in range(0, count, tokens):
            own = slice(start, start + tokens)
            made.launch(
                (blocks * clusters, 1, 1),
                32 * part.warps,
                (
                    *stored[number],
                    offset if last else None,
                    inputs.image[own],
                    inputs.factors[own],
                    None if number == 0 or sums is None else sums[own],
                    None if last or sums is None else sums[own],
                    result[own],
                    min(tokens, count - start),
                    outputs,
                    columns,
                    first_column,
                    width,
                    columns // groups,
                ),
                shared=part.shared,
                cluster=(blocks, 1, 1),
                overlap=True,  # what it reads early was written before `arrange` began
            )
        first_column += columns
    return result.view(*x.shape[:-1], outputs)


def _aligned(part: Tensor) -> Tensor:
    """A part of the weight, contiguous, at an address that wide loads can read."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % 16 else part
