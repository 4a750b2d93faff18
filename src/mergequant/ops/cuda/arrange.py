"""Inputs of the weight-only kernels: float16 in stored order (`arrange.cu`, `half.cuh`), made once for all tokens."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel
from mergequant.ops.overlap import overlaps

__all__ = ["COLUMNS", "LARGEST_WIDTH", "SHARED", "Arranged", "arrange", "arrange_unit", "token_bytes"]

COLUMNS = 32  # neighbouring columns that a lane meets: widths are multiples of it
CHUNK, ROW_PAD = 128, 64  # columns of a chunk, and bytes after a token, as in half.cuh
SHARED = 227 * 1024  # bytes of shared memory that a block of sm_90 can have
LARGEST_WIDTH = SHARED // 2 // CHUNK * CHUNK  # a row fits a block
MOST_THREADS = 1024
ALIGNMENT = 16


@dataclass(frozen=True)
class Arranged:
    """Inputs as the kernels read them.

    Attributes:
        image: uint8 (tokens, token_bytes(width)).
        factors: float32 (tokens,), by which a token's results are multiplied.
        natural: int16 (passes, width, tokens of a pass), float16 inputs in natural order; None if not asked for.
    """

    image: Tensor
    factors: Tensor
    natural: Tensor | None


def token_bytes(width: int) -> int:
    """Bytes of a token's inputs."""
    return -(-width // CHUNK) * 2 * CHUNK + ROW_PAD


@cache
def arrange_unit(half: bool, ordered: bool, tokens: int, natural: bool, threads: int) -> Unit:
    """The kernel for inputs of float16 (`half`) or bfloat16, and passes of so many tokens."""
    return Unit(
        "arrange.cu",
        (
            ("MQ_THREADS", threads),
            ("MQ_HALF", int(half)),
            ("MQ_ORDERED", int(ordered)),
            ("MQ_TOKENS", tokens),
            ("MQ_NATURAL", int(natural)),
        ),
    )


def arrange(rows: Tensor, order: Tensor | None, tokens: int, natural: bool) -> Arranged:
    """Launch it on rows (count, width), contiguous bfloat16 or float16, for passes of `tokens`.

    Raises:
        KernelError: the kernel cannot be compiled or launched.
    """
    count, width = rows.shape
    if rows.data_ptr() % ALIGNMENT:
        rows = rows.clone()
    image = torch.empty((count, token_bytes(width)), dtype=torch.uint8, device=rows.device)
    factors = torch.empty(count, dtype=torch.float32, device=rows.device)
    shape = (-(-count // tokens), width, tokens)
    other = torch.empty(shape, dtype=torch.int16, device=rows.device) if natural else None
    threads = min(MOST_THREADS, -(-width // (8 * COLUMNS)) * COLUMNS)
    unit = arrange_unit(rows.dtype == torch.float16, order is not None, tokens, natural, threads)
    kernel(unit, "arrange", rows.device).launch(
        (count, 1, 1),
        threads,
        (rows, order, image, factors, other, width),
        shared=2 * width,
        overlap=overlaps(rows.device),
    )
    return Arranged(image, factors, other)
