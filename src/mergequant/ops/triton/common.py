"""What the elementwise Triton kernels share: rounding, channel vectors, packed stores, launching.

All of them hold a row of at most `MOST_HELD` values in the registers of one program and walk over longer rows in pieces
of that size. They keep the order of float32 operations of the torch references and are launched without contraction of
a * b + c (`enable_fp_fusion=False`), so that codes equal the reference's bit for bit wherever the sums are the same.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mergequant.grids import IntegerGrid
from mergequant.ops.overlap import overlaps

__all__ = [
    "MOST_HELD",
    "as_rows",
    "block_for",
    "channel_vector",
    "code_constants",
    "launch",
    "launch_strided",
    "quotient",
    "round_to_code",
    "store_codes",
    "vector_constants",
    "wait_for_predecessor",
    "warps_for",
]

MOST_HELD = 16384
MOST_WARPS = 16
FEW_ROWS = 128  # fewer rows than about this leave the GPU idle: what counts is the latency of one row
VALUES_PER_THREAD = 16
VALUES_PER_THREAD_FEW_ROWS = 8
LEAST_BLOCK = 16


@triton.jit
def wait_for_predecessor(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait until the one ahead has written all. Constants may be loaded before."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def channel_vector(vector, columns, inside, STEP: tl.constexpr):
    """A channel vector at `columns`. STEP 0: all channels share its one element, a scalar."""
    value = tl.load(vector) if STEP == 0 else tl.load(vector + columns, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def round_to_code(scaled, LOW: tl.constexpr, HIGH: tl.constexpr):
    """int32 whose low byte is the code of `scaled`: nearest integer, ties to even, kept in LOW..HIGH.

    Adding 1.5 * 2^23 leaves no bit for fractions, so the adder rounds, to even, and the sum's bit pattern is that of
    the addend plus the integer; the addend's low byte is 0. Clamping first is the same, the bounds being integers.
    """
    kept = tl.minimum(tl.maximum(scaled, LOW), HIGH)
    return (kept + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def quotient(value, divisor, reciprocal):
    """value / divisor as IEEE rounds it, with three instructions a value where a division takes about fifteen.

    `reciprocal` is 1 / divisor, rounded to nearest; one is enough for a row. The first fused multiply-add yields what
    value * reciprocal leaves over without rounding, the second adds its share (Markstein 1990).
    """
    first = value * reciprocal
    return tl.fma(tl.fma(-divisor, first, value), reciprocal, first)


@triton.jit
def store_codes(row, start, codes, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Write BLOCK codes from column `start` of a row that begins at the pointer `row`."""
    if PACKED:
        even, odd = tl.split(tl.reshape(codes, (BLOCK // 2, 2)))
        pair = start // 2 + tl.arange(0, BLOCK // 2)
        tl.store(row + pair, ((even & 15) | ((odd & 15) << 4)).to(tl.uint8), mask=pair < WIDTH // 2)
    else:
        columns = start + tl.arange(0, BLOCK)
        tl.store(row + columns, codes.to(tl.int8), mask=columns < WIDTH)


def as_rows(x: Tensor) -> Tensor:
    """x (..., width) as contiguous (rows, width)."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def block_for(width: int, most: int | None = None) -> int:
    """Columns that a program holds of a row: a power of two, the whole row if it fits into `most` (`MOST_HELD`)."""
    return min(MOST_HELD if most is None else most, max(LEAST_BLOCK, triton.next_power_of_2(width)))


def warps_for(block: int, rows: int) -> int:
    """Warps of a program that holds `block` columns, when `rows` of them run."""
    each = VALUES_PER_THREAD_FEW_ROWS if rows < FEW_ROWS else VALUES_PER_THREAD
    return min(MOST_WARPS, max(1, block // (32 * each)))


def vector_constants(multiplier: Tensor | None, shift: Tensor | None) -> dict[str, int]:
    """Steps from one channel to the next: 0 for a vector of one element that all channels share."""
    one = [vector is not None and vector.shape[0] == 1 for vector in (multiplier, shift)]
    return {"MULTIPLIER_STEP": 0 if one[0] else 1, "SHIFT_STEP": 0 if one[1] else 1}


def code_constants(bits: int, packed: bool = False) -> dict[str, Any]:
    """Bounds of the codes and their storage."""
    grid = IntegerGrid(bits)
    return {"LOW": float(grid.low), "HIGH": float(grid.high), "PACKED": packed}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Tensor | float | int | None],
    device: torch.device,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Run a kernel whose last constant is OVERLAP, on the device's current stream. An empty grid runs nothing."""
    contiguous = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]
    launch_strided(kernel, grid, contiguous, device, warps, stages, **constants)


def launch_strided(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Tensor | float | int | None],
    device: torch.device,
    warps: int,
    stages: int = 1,
    **constants: Any,
) -> None:
    """As `launch`, for a kernel that knows its tensors' strides: they are not made contiguous."""
    if 0 in grid:
        return
    overlap = overlaps(device)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if overlap:
        options["launch_pdl"] = True
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, OVERLAP=overlap, **options)
