"""Launch of `sparse_dense.cu`: 4-bit groups with zero points and outliers, for a few tokens."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops.cuda.arrange import COLUMNS, SHARED, arrange, token_bytes
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel, multiprocessors
from mergequant.ops.overlap import overlaps

__all__ = ["Configuration", "choose", "linear", "reason_against", "unit"]

TILE = 16  # outputs of a block at a time; rows that share statistics are whole tiles
MOST_TOKENS = 16  # of a launch: more take several
SUM_ROW = 20  # words of 16 sums, as in half.cuh
SMALL_GROUPS = (8, 16)
SHAPES = ((8, 2), (16, 1))  # warps of a block, which share k, and blocks side by side: the first that fits
STATIC = 2048  # bytes of shared memory of a block that are not counted here
LARGEST_WEIGHT = 1 << 31  # bytes of each of its parts then have numbers of 32 bits
SHARED_MULTIPROCESSOR, SHARED_RESERVED = 228 * 1024, 1024
SCALES, ZEROS, LEVELS = range(3)  # kinds of statistics, as in sparse_dense.cu


@dataclass(frozen=True)
class Configuration:
    """Tokens of a launch; warps of a block, which share k; blocks side by side."""

    tokens: int
    warps: int
    blocks: int

    def shared(self, width: int) -> int:
        """Bytes of shared memory of a block: inputs, and two buffers of sums."""
        sums = 2 * (self.warps + 1) * SUM_ROW * 4
        return self.tokens * (token_bytes(width) + sums)

    def fits(self, width: int) -> bool:
        """Whether its blocks fit side by side."""
        used = self.shared(width) + STATIC
        return used <= SHARED and (used + SHARED_RESERVED) * self.blocks <= SHARED_MULTIPROCESSOR


@cache
def choose(tokens: int, width: int) -> Configuration | None:
    """Configuration for so many tokens, all in one launch if that fits; None: not even one token does."""
    size = min(MOST_TOKENS, 1 << max(tokens - 1, 0).bit_length())
    while size:
        for warps, blocks in SHAPES:
            known = Configuration(size, warps, blocks)
            if known.fits(width):
                return known
        size //= 2
    return None


def reason_against(
    x: Tensor, codes: Tensor, scale: Tensor, pointers: Tensor | None, columns: Tensor | None, bits: int, tile: int
) -> str | None:
    """Why the kernel does not take these arguments; None if it does."""
    width = x.shape[-1]
    group = width // scale.shape[1]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 and float16, not {x.dtype}"
    if bits != 4:
        return f"the CUDA kernel reads codes of 4 bits, not {bits}"
    if width % COLUMNS or (group not in SMALL_GROUPS and group % COLUMNS):
        return (
            f"the CUDA kernel wants groups of 8, 16 or a multiple of {COLUMNS} in such a width, not {group} of {width}"
        )
    if tile % TILE:
        return f"the CUDA kernel wants second-level tiles of a multiple of {TILE} rows, not {tile}"
    if codes.shape[0] * width > LARGEST_WEIGHT:
        return f"the CUDA kernel counts {LARGEST_WEIGHT} weights, not {codes.shape[0]} x {width}"
    if columns is not None and pointers is None:
        return "the CUDA kernel reads outliers row by row, not whole columns"
    return None if choose(1, width) else f"a row of {width} inputs does not fit the CUDA kernel's shared memory"


@cache
def unit(configuration: Configuration, group: int, kind: int, tile: int, sparse: bool, half: bool) -> Unit:
    """What is compiled; `tile`: rows that share statistics; `half`: results are float16, else bfloat16."""
    return Unit(
        "sparse_dense.cu",
        (
            ("MQ_TOKENS", configuration.tokens),
            ("MQ_GROUP", group),
            ("MQ_KIND", kind),
            ("MQ_TILE", max(tile // TILE, 1)),
            ("MQ_SPARSE", int(sparse)),
            ("MQ_HALF", int(half)),
            ("MQ_WARPS", configuration.warps),
            ("MQ_BLOCKS", configuration.blocks),
        ),
    )


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
    *,
    configuration: Configuration | None = None,
) -> Tensor:
    """`sparse_dense_linear` of checked arguments that `reason_against` has nothing against.

    Raises:
        KernelError: the kernel cannot be compiled or launched.
    """
    outputs, width, groups = codes.shape[0], x.shape[-1], scale.shape[1]
    rows = _aligned(x.reshape(-1, width))
    count = rows.shape[0]
    configuration = configuration or choose(count, width)
    if configuration is None:
        raise KernelError(f"sparse_dense_linear: a row of {width} inputs does not fit; see reason_against")
    result = torch.empty((count, outputs), dtype=x.dtype, device=x.device)
    # All that may launch something comes before the first kernel of ours: the next one reads it early.
    given = (codes, scale, zero, statistics, pointers, columns, values)
    weight = [None if part is None else _aligned(part) for part in given]
    offset = None if bias is None else bias.float().contiguous()
    sparse = pointers is not None
    inputs = arrange(rows, None if order is None else _aligned(order), configuration.tokens, sparse)
    kind = LEVELS if statistics is not None else SCALES if zero is None else ZEROS
    made = unit(configuration, width // groups, kind, tile, sparse, x.dtype == torch.float16)
    # What it reads early was written before `arrange` began: unless it was copied just now, and that overlaps, too.
    copied = any(own is not old for own, old in zip(weight, given))
    early = not (copied and overlaps(x.device))
    blocks = min(-(-outputs // TILE), configuration.blocks * multiprocessors(x.device))
    for number, start in enumerate(range(0, count, configuration.tokens)):
        own = slice(start, start + configuration.tokens)
        natural = None if inputs.natural is None else inputs.natural[number]
        kernel(made, "sparse_dense", x.device).launch(
            (blocks, 1, 1),
            32 * configuration.warps,
            (
                *weight,
                offset,
                inputs.image[own],
                inputs.factors[own],
                natural,
                result[own],
                min(configuration.tokens, count - start),
                outputs,
                width,
            ),
            shared=configuration.shared(width),
            overlap=early,
        )
    return result.view(*x.shape[:-1], outputs)


def _aligned(part: Tensor) -> Tensor:
    """A part of the weight, contiguous, at an address that wide loads can read."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % 16 else part
