"""Launch of `codebook.cu`: weights in codebooks, for a few tokens, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergequant.grids.codebook import vectors_for
from mergequant.ops.cuda.arrange import COLUMNS, LARGEST_WIDTH, SHARED, arrange
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel, multiprocessors
from mergequant.ops.overlap import overlaps

__all__ = ["Part", "Plan", "cluster_for", "linear", "plan", "reason_against", "unit"]

TILE = 16  # rows of indices that a block takes at a time
MOST_TOKENS = 8  # of a launch: more take several
FUSED_TOKENS = 4  # up to which the kernel arranges its inputs itself, where they fit
MOST_VECTOR = 16
INDEX_STEP = 4  # bits of an index and its residual index together are a multiple of it
SMALL_BOOKS = 96 * 1024  # bytes of copies of the books: lanes with a copy of their own do not meet in a bank
BANKS = 128  # bytes that shared memory serves at once
BYTE_STRIDE = 2 * BANKS
RESERVED = 1024  # bytes of shared memory that are not divided here
PROCESSORS_TOGETHER = 16  # multiprocessors of which a cluster takes its blocks
MOST_BLOCKS = 2  # of a cluster: larger ones do not all find their places side by side, and run one after the other
MOST_SLOTS = 12  # tiles of a batch
OVERHEAD = 512  # columns of a tile that it costs to be a cluster
WARPS = ((4, 16), (8, 12), (MOST_VECTOR, 8))  # of a block, for vectors up to a length: long ones need more registers


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
    def unit(self) -> int:
        """Columns that a warp takes at a time: of each of four lanes, whole 16 bytes of indices."""
        symbol = self.bits + self.residual_bits
        return 4 * (32 if symbol % 8 else 16 if symbol % 16 else 8)

    @property
    def units(self) -> int:
        """Of a row."""
        return -(-self.columns // self.unit)

    @property
    def copies(self) -> int:
        """Copies of the books in shared memory; 0: they stay in global memory."""
        size = self.groups * self.entries * self.room
        if size + self.sums > SHARED - RESERVED:
            return 0
        copies = 1
        while 2 * copies * self.room <= BANKS and 2 * copies * size <= min(SMALL_BOOKS, SHARED - RESERVED - self.sums):
            copies *= 2
        return copies

    @property
    def books(self) -> int:
        """Bytes of shared memory for books; where an index is a byte, entries of them stand `BYTE_STRIDE` apart."""
        if self.copies and self.bits == 8 and self.residual_bits in (0, 8) and self.groups == 1:
            return 256 * BYTE_STRIDE
        return self.copies * self.groups * self.entries * self.room

    @property
    def sums(self) -> int:
        """Bytes of shared memory for sums of a tile: of all warps."""
        return 4 * TILE * self.vector * self.tokens * self.warps


@dataclass(frozen=True)
class Plan:
    """How a part is run: blocks of a cluster, clusters, tiles of a batch, whether inputs are arranged, bytes of shared
    memory of a block."""

    blocks: int
    clusters: int
    slots: int
    fused: bool
    shared: int


@cache
def plan(part: Part, outputs: int, width: int, processors: int, blocks: int | None = None) -> Plan:
    """The division for the least time; `blocks` of a cluster, if they are given."""
    tiles = -(-vectors_for(outputs, part.vector) // TILE)
    blocks, clusters = cluster_for(tiles, part.units, OVERHEAD // part.unit, processors, blocks)
    inputs = 2 * -(-part.units // blocks) * part.unit * (part.tokens + 1)  # and their order
    free = SHARED - RESERVED - part.books
    row = 2 * width * part.tokens
    fused = part.tokens <= FUSED_TOKENS and inputs + max(row, part.sums) <= free
    if not fused:
        inputs = row = 0
    count = -(-tiles // clusters)
    most = max(1, min(MOST_SLOTS, (free - inputs) // part.sums))
    slots = -(-count // -(-count // most))  # batches of about the same size
    return Plan(blocks, clusters, slots, fused, part.books + inputs + max(row, slots * part.sums))


def cluster_for(tiles: int, units: int, overhead: int, processors: int, blocks: int | None = None) -> tuple[int, int]:
    """Blocks that share the columns of a tile, and clusters of them that run side by side, for the least time.

    Args:
        tiles: of rows of indices.
        units: of columns.
        overhead: units that it costs to be a cluster.
        processors: of the device.
        blocks: of a cluster, if they are given.
    """
    best = (0, 1, 1)
    for size in range(1, min(MOST_BLOCKS, units) + 1) if blocks is None else (blocks,):
        clusters = processors // PROCESSORS_TOGETHER * (PROCESSORS_TOGETHER // size) if size > 1 else processors
        if clusters < 1:
            break
        time = -(-tiles // clusters) * -(-units // size) + (overhead if size > 1 else 0)
        if best[0] == 0 or time < best[0]:
            best = (time, size, min(clusters, tiles))
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
def unit(part: Part, cluster: int, fused: bool, ordered: bool, half: bool) -> Unit:
    """What is compiled; `fused`: inputs are arranged in it; `half`: x and results are float16, else bfloat16."""
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
            ("MQ_FUSED", int(fused)),
            ("MQ_ORDERED", int(fused and ordered)),
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
    rows = _aligned(x.reshape(-1, width))
    count = rows.shape[0]
    tokens = min(MOST_TOKENS, 1 << max(count - 1, 0).bit_length())
    result = torch.empty((count, outputs), dtype=x.dtype, device=x.device)
    sums = torch.empty((count, outputs), dtype=torch.float32, device=x.device) if len(books) > 1 else None
    # All that may launch something comes before the first kernel of ours: the next one reads it early.
    offset = None if bias is None else bias.float().contiguous()
    stored = [(_aligned(words), _aligned(book)) for words, book in zip(indices, books)]
    numbers = None if order is None else _aligned(order)
    parts = []
    for number, book in enumerate(books):
        columns, bits, residual_bits = layout[3 * number : 3 * number + 3]
        groups, entries, vector = book.shape
        parts.append(Part(columns, bits, residual_bits, groups, entries, vector, tokens))
    plans = [plan(part, outputs, width, multiprocessors(x.device), cluster) for part in parts]
    inputs = None if all(own.fused for own in plans) else arrange(rows, numbers, tokens, False)
    first_column = 0
    # Its constants must have been written long before: not copied just now, where kernels overlap anyway.
    pairs = [*zip(indices, (words for words, _ in stored)), *zip(books, (book for _, book in stored)), (order, numbers)]
    copied = any(new is not old for old, new in pairs)
    early = not copied if overlaps(x.device) else inputs is not None
    for number, (part, own) in enumerate(zip(parts, plans)):
        made = kernel(
            unit(part, own.blocks, own.fused, order is not None, x.dtype == torch.float16), "codebook", x.device
        )
        last = number == len(books) - 1
        for start in range(0, count, tokens):
            taken = slice(start, start + tokens)
            made.launch(
                (own.blocks * own.clusters, 1, 1),
                32 * part.warps,
                (
                    *stored[number],
                    numbers,
                    offset if last else None,
                    rows[taken],
                    None if inputs is None else inputs.image[taken],
                    None if inputs is None else inputs.factors[taken],
                    None if number == 0 or sums is None else sums[taken],
                    None if last or sums is None else sums[taken],
                    result[taken],
                    min(tokens, count - start),
                    outputs,
                    part.columns,
                    first_column,
                    width,
                    part.columns // part.groups,
                    own.slots,
                ),
                shared=own.shared,
                cluster=(own.blocks, 1, 1),
                overlap=early,
            )
            early = True
        first_column += part.columns
    return result.view(*x.shape[:-1], outputs)


def _aligned(part: Tensor) -> Tensor:
    """A part of the weight, contiguous, at an address that wide loads can read."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % 16 else part
