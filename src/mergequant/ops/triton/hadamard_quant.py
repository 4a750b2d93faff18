"""Triton version of `hadamard_quant` and `hadamard_dynamic_quant`: two small matrix products and the codes, one kernel.

A row x is a matrix X (a, b), its rotation outer^T X inner / sqrt(width), with factors of plus and minus ones (see
`hadamard.sign_factors`). Tensor cores do both products, on the transpose (b, a): inner X^T, then the result times
outer, which stays in registers between the two. Plus and minus one and 16-bit inputs are exact in 16 bits; the float32
sums of the first product are not, so they enter the second one as two bfloat16 numbers, the nearest and what it leaves:
16 bits of precision. X goes through in chunks of lines, which are the terms of the second product.

A program keeps the factors in shared memory and walks over rows. It makes `SLICE` lines of the transpose at once; they
are independent of others but for the largest magnitude of a token. With a static step slices are spread over programs.
With a dynamic one, a row that does not fit into the registers of a program at once waits in float32 in a scratch row of
that program, small enough to stay in the cache.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.grids import IntegerGrid
from mergequant.ops.dynamic_quant import SMALLEST_SCALE
from mergequant.ops.hadamard import rotation, sign_factors
from mergequant.ops.triton.common import (
    FEW_ROWS,
    as_rows,
    channel_vector,
    code_constants,
    launch,
    quotient,
    round_to_code,
    vector_constants,
    wait_for_predecessor,
)
from mergequant.ops.triton.static_quant import static_quant

__all__ = ["Plan", "hadamard_dynamic_quant", "hadamard_quant", "plan", "reason_against"]

LEAST_ORDER = 16  # a matrix product on tensor cores takes at least 16 rows, columns and terms
MOST_ORDER = 256  # of a factor: two of them and a row fit into the shared memory of a multiprocessor
MOST_AREA = 32768  # values of a padded row
SLICE_AREA = 16384  # values of a slice: 64 registers of 256 threads
SLICE_AREA_VIA_SCRATCH = 8192  # half, for two programs on a multiprocessor: one multiplies while the other stores
MOST_RESIDENT = 8  # programs on a multiprocessor
SHARED_RESERVE = 8 * 1024  # of a multiprocessor's shared memory: what the system and Triton itself take
SHARED_HOPPER = 228 * 1024
CHUNK = 64  # lines of X that the products take at once: what lies between them is then half of the registers
LEAST_RUN = 64  # bytes that the store of a line of the transpose covers
PIECE = 4096  # columns of a scratch row that are turned into codes at once
LINES_PER_WARPGROUP = 64  # of a product on Hopper's tensor cores
NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Plan:
    """How a width is cut: X is (a, b), padded to (outer, inner); `slice` rows of the transpose at once."""

    a: int
    b: int
    outer: int
    inner: int
    slice: int
    warps: int
    stages: int
    programs: int  # that walk over the rows, for each slice


@triton.jit
def _row_of_x(row, A: tl.constexpr, B: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr, first: tl.constexpr):
    """Lines first..first + CHUNK of X, zero beyond (A, B), of the row that begins at a pointer."""
    a = first + tl.arange(0, CHUNK)
    i = tl.arange(0, INNER)
    return tl.load(row + a[:, None] * B + i[None, :], mask=(a < A)[:, None] & (i < B)[None, :], other=0.0)


@triton.jit
def _outer_chunks(outer, OUTER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Tuple of the lines of `outer` that belong to each chunk of X."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * CHUNK + tl.arange(0, CHUNK)
        lines = tl.load(outer + k[:, None] * OUTER + tl.arange(0, OUTER)[None, :])
        chunks = chunks + (lines,)  # type: ignore[assignment]  # noqa: RUF005, Triton unpacks no tuple into another
    return chunks


@triton.jit
def _rotated(
    row,
    left,
    right,
    scale,
    A: tl.constexpr,
    B: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """(left X^T) right * scale, float32 (SLICE, OUTER), of the row that begins at a pointer; right in chunks."""
    total = tl.zeros((SLICE, OUTER), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        wide = _row_of_x(row, A, B, INNER, CHUNK, chunk * CHUNK)
        tile = wide.to(left.dtype)
        turned = tl.dot(left.to(FIRST), tl.trans(tile).to(FIRST))
        if SPLIT:
            rest = (wide - tile.to(tl.float32)).to(left.dtype)
            turned = tl.dot(left.to(FIRST), tl.trans(rest).to(FIRST), turned)
        high = turned.to(tl.bfloat16)
        low = (turned - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(high.to(SECOND), right[chunk].to(SECOND), total)
        total = tl.dot(low.to(SECOND), right[chunk].to(SECOND), total)
    return total * scale


@triton.jit(do_not_specialize=["rows"])  # any number of rows is one kernel; it ends a loop, no more
def _rotate(
    x,
    inner,  # (INNER, INNER) of x's dtype (bfloat16 for float32), zero beyond (B, B)
    outer,  # (OUTER, OUTER) bfloat16, zero beyond (A, A)
    multiplier,
    shift,
    out,
    scales,  # of tokens; None: static steps
    scratch,  # float32 (programs, WIDTH), where a dynamic row has more than one slice
    rows,
    scale,  # 1 / sqrt(WIDTH)
    share,  # of the largest magnitude that one step is
    smallest,
    A: tl.constexpr,
    B: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,  # x is float32
    FIRST: tl.constexpr,  # dtype of the first product's factors: that of `inner` ...
    SECOND: tl.constexpr,  # ... and of the second's: bfloat16; float32 in the interpreter, which multiplies no bfloat16
    QUANTIZE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PACKED: tl.constexpr,
    MULTIPLIER_STEP: tl.constexpr,
    SHIFT_STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    WIDTH: tl.constexpr = A * B
    SLICES: tl.constexpr = INNER // SLICE
    CHUNKS: tl.constexpr = (A + CHUNK - 1) // CHUNK
    DYNAMIC: tl.constexpr = scales is not None
    VIA_SCRATCH: tl.constexpr = scratch is not None
    a = tl.arange(0, OUTER)
    i = tl.arange(0, INNER)
    lines = tl.arange(0, SLICE)
    right = _outer_chunks(outer, OUTER, CHUNK, CHUNKS)
    if not VIA_SCRATCH:
        j = tl.program_id(1) * SLICE + lines
        left = tl.load(inner + j[:, None] * INNER + i[None, :])
        targets = a[None, :] * B + j[:, None]
        inside = (a < A)[None, :] & (j < B)[:, None]
    wait_for_predecessor(OVERLAP)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        begin = tl.cast(row, tl.int64) * WIDTH
        if VIA_SCRATCH:
            own = scratch + tl.program_id(0).to(tl.int64) * WIDTH
            largest = 0.0
            for piece in range(SLICES):
                j = piece * SLICE + lines
                left = tl.load(inner + j[:, None] * INNER + i[None, :])
                value = _rotated(
                    x + begin, left, right, scale, A, B, OUTER, INNER, SLICE, CHUNK, CHUNKS, SPLIT, FIRST, SECOND
                )
                largest = tl.maximum(largest, tl.max(tl.max(tl.abs(value), 1), 0))
                tl.store(own + a[None, :] * B + j[:, None], value, mask=(a < A)[None, :] & (j < B)[:, None])
            step = tl.maximum(largest * share, smallest)
            tl.store(scales + row, step)
            reciprocal = tl.div_rn(1.0, step)
            tl.debug_barrier()  # other threads of the program wrote what is read now
            for start in range(0, WIDTH, PIECE):
                columns = start + tl.arange(0, PIECE)
                again = tl.load(own + columns, mask=columns < WIDTH, other=0.0)
                codes = round_to_code(quotient(again, step, reciprocal), LOW, HIGH)
                tl.store(out + begin + columns, codes.to(tl.int8), mask=columns < WIDTH)
            tl.debug_barrier()  # all have read before the next row overwrites
        else:
            value = _rotated(
                x + begin, left, right, scale, A, B, OUTER, INNER, SLICE, CHUNK, CHUNKS, SPLIT, FIRST, SECOND
            )
            if DYNAMIC:
                step = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0) * share, smallest)
                tl.store(scales + row, step)
                value = quotient(value, step, tl.div_rn(1.0, step))
            else:
                if multiplier is not None:
                    value = value * channel_vector(multiplier, targets, inside, MULTIPLIER_STEP)
                if shift is not None:
                    value = value + channel_vector(shift, targets, inside, SHIFT_STEP)
            if QUANTIZE:
                tl.store(out + begin + targets, round_to_code(value, LOW, HIGH).to(tl.int8), mask=inside)
            else:
                tl.store(out + begin + targets, value, mask=inside)


@cache
def reason_against(width: int, shared: int = SHARED_HOPPER) -> str | None:
    """Why the kernel does not take a width on a GPU with so much shared memory in a multiprocessor; None if it does."""
    built = rotation(width)
    if not built.is_hadamard:
        return f"width {width} has no rotation of plus and minus ones here ({built.name})"
    if not _cuts(width):
        return f"width {width} does not fit into one program ({built.name})"
    a, _, outer, inner = _cut(width)
    least = _shared_bytes(a, outer, inner, LEAST_ORDER, 1) + SHARED_RESERVE
    return None if least <= shared else f"width {width} wants {least} bytes of shared memory, the GPU has {shared}"


def hadamard_quant(x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    """`hadamard_quant` of checked arguments. Gathered codes take a second kernel: a gather crosses slices."""
    if index is not None:
        rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _launch(x, None, None, rotated, None, None, None)
        return static_quant(rotated, multiplier, index, shift, bits, packed=False)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    _launch(x, multiplier, shift, out, None, None, bits)
    return out


def hadamard_dynamic_quant(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`hadamard_dynamic_quant` of checked arguments."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _launch(x, None, None, out, scales, clip_ratio, bits)
    return out, scales


@cache
def plan(width: int, rows: int, dynamic: bool, processors: int, shared: int = SHARED_HOPPER) -> Plan:
    """How to cut a width for so many rows (a power of two, at most `FEW_ROWS`) on so many multiprocessors."""
    a, b, outer, inner = _cut(width)
    shared -= SHARED_RESERVE
    via_scratch = dynamic and outer * inner > SLICE_AREA
    area = max(SLICE_AREA_VIA_SCRATCH, LINES_PER_WARPGROUP * outer) if via_scratch else SLICE_AREA
    piece = min(inner, max(LEAST_ORDER, area // outer))
    if not dynamic:  # few rows: spread the slices of each over the GPU
        piece = min(piece, triton.next_power_of_2(max(LEAST_ORDER, inner * rows // processors)))
    while piece > LEAST_ORDER and _shared_bytes(a, outer, inner, piece, 1) > shared:
        piece //= 2
    warps = 8 if piece > LINES_PER_WARPGROUP else 4
    slices = 1 if dynamic else inner // piece
    ahead = rows >= FEW_ROWS and not (dynamic and piece < inner)  # fetch the next row early
    stages = 2 if ahead and _shared_bytes(a, outer, inner, piece, 2) <= shared else 1
    at_once = min(MOST_RESIDENT, max(1, SLICE_AREA // (outer * piece)))
    return Plan(a, b, outer, inner, piece, warps, stages, programs=max(1, at_once * processors // slices))


def _shared_bytes(a: int, outer: int, inner: int, piece: int, stages: int) -> int:
    """About what a program takes: chunks of X, lines of both factors in 16 bits, and the codes on their way out."""
    chunk = min(CHUNK, outer)
    lines = triton.cdiv(a, chunk) * chunk
    return 2 * (stages * lines * inner + piece * inner + lines * outer) + piece * outer


def _cuts(width: int) -> list[tuple[int, int, int, int]]:
    """All (a, b, padded a, padded b) that fit."""
    cuts = []
    for exponent in range(rotation(width).power.bit_length()):
        b = 2**exponent
        outer, inner = (max(LEAST_ORDER, triton.next_power_of_2(order)) for order in (width // b, b))
        if max(outer, inner) <= MOST_ORDER and outer * inner <= MOST_AREA:
            cuts.append((width // b, b, outer, inner))
    return cuts


def _cut(width: int) -> tuple[int, int, int, int]:
    """The cut with the fewest multiplications; of equals one that stores wide runs and holds few registers."""

    def cost(cut: tuple[int, int, int, int]) -> tuple[int, int, int]:
        a, b, outer, inner = cut
        chunk = min(CHUNK, outer)
        return triton.cdiv(a, chunk) * chunk * inner * (inner + 2 * outer), -min(b, LEAST_RUN), b

    cuts = _cuts(width)
    if not cuts:
        raise KernelError(f"hadamard_quant: {reason_against(width)}; run it on the torch backend")
    return min(cuts, key=cost)


@cache
def _factors(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b, outer_order, inner_order = _cut(width)
    outer = torch.zeros(outer_order, outer_order)
    inner = torch.zeros(inner_order, inner_order)
    outer[:a, :a], inner[:b, :b] = sign_factors(width, b)
    return outer.to(device, torch.bfloat16), inner.to(device, dtype)


def _launch(
    x: Tensor,
    multiplier: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    clip_ratio: float | None,
    bits: int | None,
) -> None:
    """bits None: rotated floats; scales None: static."""
    if out.numel() == 0:
        return
    rows = as_rows(x)
    count, width = rows.shape
    on_gpu = x.device.type == "cuda"
    gpu = torch.cuda.get_device_properties(x.device) if on_gpu else None
    size = (1,) if gpu is None else (gpu.multi_processor_count, gpu.shared_memory_per_multiprocessor)
    dynamic = scales is not None
    cut = plan(width, min(FEW_ROWS, triton.next_power_of_2(count)), dynamic, *size)
    programs = min(count, cut.programs)
    narrow = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    outer, inner = _factors(width, x.device, narrow)
    slices = cut.inner // cut.slice
    scratch = None
    if dynamic and slices > 1:
        scratch = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    grid_bits = 8 if bits is None else bits
    share = 0.0 if clip_ratio is None else clip_ratio / IntegerGrid(grid_bits).high
    launch(
        _rotate,
        (programs, 1 if dynamic else slices),
        (rows, inner, outer, multiplier, shift, out, scales, scratch, count, width**-0.5, share, SMALLEST_SCALE),
        x.device,
        cut.warps,
        cut.stages,
        A=cut.a,
        B=cut.b,
        OUTER=cut.outer,
        INNER=cut.inner,
        SLICE=cut.slice,
        CHUNK=min(CHUNK, cut.outer),
        PIECE=PIECE,
        SPLIT=x.dtype == torch.float32,
        FIRST=NARROW[narrow] if on_gpu else tl.float32,
        SECOND=tl.bfloat16 if on_gpu else tl.float32,
        QUANTIZE=bits is not None,
        **code_constants(grid_bits),
        **vector_constants(multiplier, shift),
    )
