"""Host side of the CUDA norms and quantizers: which variant runs, over which grid, and its launch.

They stand in for the Triton kernels on machines where Triton cannot build its launcher, for want of a C compiler; NVRTC
needs none. Functions are those of `ops.triton`: `norm_quant`, `static_quant`, `dynamic_quant` and `silu_mul`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops._elementwise import MOST_GATHERED
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import Argument, kernel, multiprocessors
from mergequant.ops.dynamic_quant import SMALLEST_SCALE
from mergequant.ops.overlap import overlaps

__all__ = [
    "add_rmsnorm",
    "add_rmsnorm_quant",
    "dynamic_quant",
    "dynamic_unit",
    "gather_unit",
    "norm_quant",
    "norm_unit",
    "silu_mul",
    "silu_mul_dynamic_quant",
    "silu_mul_quant",
    "static_quant",
    "static_unit",
]

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of elements, as in elementwise.cuh
NO_KIND = -1
GROUP = 8  # values that a thread takes at once
ALIGNMENT = 16  # bytes of an access
NARROW_BYTES = 2
LEAST_THREADS, MOST_THREADS = 64, 1024
MOST_HELD = 2  # groups of a row in a thread's registers: more would spill with 1024 threads
WARP = 32
GATHERING_THREADS = 1280  # on a multiprocessor: 48 registers for a thread
CHUNK_THREADS = 256  # of a block of static_quant
CHUNK_BLOCKS = 8  # of them on a multiprocessor


def norm_unit(
    x: torch.dtype,
    residual: torch.dtype | None,
    gain: torch.dtype,
    bits: int,
    *,
    channels: int,
    packed: bool = False,
    centre: bool = False,
    gathered: bool = False,
    multiplier: int = 2,
    shift: int = 0,
    aligned: bool = True,
) -> Unit:
    """The norm kernel for rows of `channels`. Kinds of vectors: 0 none, 1 one element, 2 one for each code.

    bits 0: floats are written, of the residual's dtype or else of x's.
    """
    threads, held = _row_plan(channels)
    if gathered and held > 1:
        held = 0  # gathered rows are read again anyway, and the indices take registers
    own = {
        "MQ_RESIDUAL": NO_KIND if residual is None else KINDS[residual],
        "MQ_GAIN": KINDS[gain],
        "MQ_CENTRE": int(centre),
        "MQ_HELD": held,
    }
    return _unit("norm_quant", threads, x, residual or x, bits, packed, gathered, multiplier, shift, aligned, own)


def gather_unit(
    x: torch.dtype,
    residual: torch.dtype | None,
    gain: torch.dtype,
    bits: int,
    *,
    longest: int,
    packed: bool = False,
    centre: bool = False,
    multiplier: int = 2,
    shift: int = 0,
) -> Unit:
    """The kernel of gathered norms for rows of 16-bit elements, of at most `longest` channels and codes."""
    threads = gather_threads(longest)
    own = {
        "MQ_RESIDUAL": NO_KIND if residual is None else KINDS[residual],
        "MQ_GAIN": KINDS[gain],
        "MQ_CENTRE": int(centre),
        "MQ_BLOCKS": _gathering_blocks(threads),
    }
    return _unit("norm_gather", threads, x, residual or x, bits, packed, True, multiplier, shift, True, own)


def gather_threads(longest: int) -> int:
    """Threads of a block: whole warps, a group of codes and of channels for each thread."""
    return max(LEAST_THREADS, -(-longest // (GROUP * WARP)) * WARP)


def static_unit(
    x: torch.dtype,
    bits: int,
    *,
    gated: bool = False,
    packed: bool = False,
    gathered: bool = False,
    multiplier: int = 2,
    shift: int = 0,
    aligned: bool = True,
) -> Unit:
    """The kernel of `static_quant`, with `gated` of `silu_mul_quant`, and with bits 0 of `silu_mul`."""
    own = {"MQ_DYNAMIC": 0, "MQ_GATED": int(gated)}
    return _unit("quantize", CHUNK_THREADS, x, x, bits, packed, gathered, multiplier, shift, aligned, own)


def dynamic_unit(
    x: torch.dtype, bits: int, *, width: int, gated: bool = False, packed: bool = False, aligned: bool = True
) -> Unit:
    """The kernel of `dynamic_quant` for rows of `width` values, with `gated` of `silu_mul_dynamic_quant`."""
    threads, held = _row_plan(width)
    own = {"MQ_DYNAMIC": 1, "MQ_GATED": int(gated), "MQ_HELD": held}
    return _unit("quantize", threads, x, x, bits, packed, False, 0, 0, aligned, own)


def _unit(
    source: str,
    threads: int,
    x: torch.dtype,
    out: torch.dtype,
    bits: int,
    packed: bool,
    gathered: bool,
    multiplier: int,
    shift: int,
    aligned: bool,
    own: dict[str, int],
) -> Unit:
    shared = {
        "MQ_THREADS": threads,
        "MQ_INPUT": KINDS[x],
        "MQ_OUTPUT": KINDS[out],
        "MQ_BITS": bits,
        "MQ_PACKED": int(packed),
        "MQ_GATHERED": int(gathered),
        "MQ_MULTIPLIER": multiplier,
        "MQ_SHIFT": shift,
        "MQ_ALIGNED": int(aligned),
    }
    return Unit(f"{source}.cu", (*shared.items(), *own.items()))


def _row_plan(width: int) -> tuple[int, int]:
    """Threads of a block that has a row of `width` values, and groups of it that a thread keeps; 0: it keeps none."""
    groups = -(-width // GROUP)
    threads = LEAST_THREADS
    while threads < min(groups, MOST_THREADS):
        threads *= 2
    held = -(-groups // threads)
    return threads, held if held <= MOST_HELD else 0


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
    out = _codes(x, x.shape[-1] if index is None else index.shape[0], packed)
    _norm(x, None, multiplier, index, shift, out, eps, bits, packed, centre)
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
    out = _codes(residual, residual.shape[-1] if index is None else index.shape[0])
    _norm(x, residual, multiplier, index, shift, out, eps, bits)
    return out


def add_rmsnorm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """`add_rmsnorm` of checked arguments; updates the residual in place unless x is None."""
    out = torch.empty_like(residual)
    values, target = (residual, None) if x is None else (x, residual)
    _norm(values, target, weight, None, bias, out, eps, bits=0)
    return out


def static_quant(
    x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int, packed: bool
) -> Tensor:
    """`static_quant` of checked arguments."""
    out = _codes(x, x.shape[-1] if index is None else index.shape[0], packed)
    _static(x, multiplier, index, shift, out, bits, packed)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu_mul` of checked arguments."""
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    _static(gate_up, None, None, None, out, bits=0, gated=True)
    return out


def silu_mul_quant(
    gate_up: Tensor, multiplier: Tensor | None, index: Tensor | None, shift: Tensor | None, bits: int
) -> Tensor:
    """`silu_mul_quant` of checked arguments."""
    out = _codes(gate_up, gate_up.shape[-1] // 2 if index is None else index.shape[0])
    _static(gate_up, multiplier, index, shift, out, bits, gated=True)
    return out


def dynamic_quant(x: Tensor, clip_ratio: float, bits: int, packed: bool) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of checked arguments."""
    return _dynamic(x, x.shape[-1], clip_ratio, bits, packed)


def silu_mul_dynamic_quant(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`silu_mul_dynamic_quant` of checked arguments."""
    return _dynamic(gate_up, gate_up.shape[-1] // 2, clip_ratio, bits, gated=True)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    eps: float,
    bits: int,
    packed: bool = False,
    centre: bool = False,
) -> None:
    """bits 0: floats, else codes."""
    if out.numel() == 0:
        return
    rows, channels = _rows(x), x.shape[-1]
    width = channels if index is None else index.shape[0]
    multiplier, index, shift = multiplier.contiguous(), _indices(index), _contiguous(shift)
    aligned = _aligned((channels, width), (rows, residual, multiplier, index, shift, out))
    narrow = all(tensor is None or tensor.element_size() == NARROW_BYTES for tensor in (x, residual))
    if index is not None and aligned and narrow and max(channels, width) <= MOST_GATHERED:
        _gather(rows, residual, multiplier, index, shift, out, eps, bits, packed, centre)
        return
    unit = norm_unit(
        x.dtype,
        None if residual is None else residual.dtype,
        multiplier.dtype,
        bits,
        channels=channels,
        packed=packed,
        centre=centre,
        gathered=index is not None,
        multiplier=_kind(multiplier, width),
        shift=_kind(shift, width),
        aligned=aligned,
    )
    arguments = (rows, residual, multiplier, index, shift, out, channels, width, float(eps))
    _launch(unit, "norm_quant", (rows.shape[0], 1, 1), _row_plan(channels)[0], arguments, x.device)


def _gather(
    rows: Tensor,
    residual: Tensor | None,
    multiplier: Tensor,
    index: Tensor,
    shift: Tensor | None,
    out: Tensor,
    eps: float,
    bits: int,
    packed: bool,
    centre: bool,
) -> None:
    """Aligned rows (tokens, channels) of 16-bit elements, in blocks that take many of them."""
    (count, channels), width = rows.shape, index.shape[0]
    longest = max(channels, width)
    unit = gather_unit(
        rows.dtype,
        None if residual is None else residual.dtype,
        multiplier.dtype,
        bits,
        longest=longest,
        packed=packed,
        centre=centre,
        multiplier=_kind(multiplier, width),
        shift=_kind(shift, width),
    )
    threads = gather_threads(longest)
    blocks = min(count, _gathering_blocks(threads) * multiprocessors(rows.device))
    arguments = (rows, residual, multiplier, index, shift, out, count, channels, width, float(eps))
    _launch(unit, "norm_gather", (blocks, 1, 1), threads, arguments, rows.device)


def _gathering_blocks(threads: int) -> int:
    """Blocks of gathered norms on a multiprocessor."""
    return max(1, GATHERING_THREADS // threads)


def _static(
    x: Tensor,
    multiplier: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    bits: int,
    packed: bool = False,
    gated: bool = False,
) -> None:
    """bits 0: floats, else codes."""
    if out.numel() == 0:
        return
    rows, channels = _rows(x), x.shape[-1] // 2 if gated else x.shape[-1]
    width = channels if index is None else index.shape[0]
    multiplier, index, shift = _contiguous(multiplier), _indices(index), _contiguous(shift)
    unit = static_unit(
        x.dtype,
        bits,
        gated=gated,
        packed=packed,
        gathered=index is not None,
        multiplier=_kind(multiplier, width),
        shift=_kind(shift, width),
        aligned=_aligned((channels, width), (rows, multiplier, index, shift, out)),
    )
    count = rows.shape[0]
    chunks = -(-width // (GROUP * CHUNK_THREADS))
    resident = -(-multiprocessors(x.device) * CHUNK_BLOCKS // chunks)  # rows that have a place at the same time
    grid = (min(count, resident), chunks, 1)
    arguments = (rows, multiplier, index, shift, out, count, channels, width)
    _launch(unit, "static_quant", grid, CHUNK_THREADS, arguments, x.device)


def _dynamic(
    x: Tensor, width: int, clip_ratio: float, bits: int, packed: bool = False, gated: bool = False
) -> tuple[Tensor, Tensor]:
    out = _codes(x, width, packed)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, scales
    rows = _rows(x)
    aligned = _aligned((width,), (rows, out))
    unit = dynamic_unit(x.dtype, bits, width=width, gated=gated, packed=packed, aligned=aligned)
    arguments = (rows, out, scales, width, clip_ratio / IntegerGrid(bits).high, SMALLEST_SCALE)
    _launch(unit, "dynamic_quant", (rows.shape[0], 1, 1), _row_plan(width)[0], arguments, x.device)
    return out, scales


def _launch(
    unit: Unit,
    name: str,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Argument],
    device: torch.device,
) -> None:
    kernel(unit, name, device).launch(grid, threads, arguments, overlap=overlaps(device))


def _rows(x: Tensor) -> Tensor:
    """x (..., width) as contiguous (rows, width)."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _codes(x: Tensor, width: int, packed: bool = False) -> Tensor:
    shape = (*x.shape[:-1], width // 2 if packed else width)
    return torch.empty(shape, dtype=torch.uint8 if packed else torch.int8, device=x.device)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _indices(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to(torch.int32).contiguous()


def _kind(vector: Tensor | None, width: int) -> int:
    """Kind of a channel vector, as in elementwise.cuh. A vector of one element serves all codes."""
    if vector is None:
        return 0
    return 1 if vector.shape[0] == 1 and width > 1 else 2


def _aligned(widths: Sequence[int], tensors: Sequence[Tensor | None]) -> bool:
    """Whether every row and vector can be read and written by 16-byte accesses.

    Rows of whole groups are multiples of 16 bytes in floats; the codes of a group are 8 bytes, or 4 packed.
    """
    whole = all(width % GROUP == 0 for width in widths)
    return whole and all(tensor is None or tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
