"""Host side of the CUDA rotation: which rows it takes, the outer factor as its lanes read it, and the launch."""

from functools import cache

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel, multiprocessors
from mergequant.ops.dynamic_quant import SMALLEST_SCALE
from mergequant.ops.hadamard import rotation, sign_factors
from mergequant.ops.overlap import overlaps

__all__ = [
    "hadamard_dynamic_quant",
    "hadamard_quant",
    "pays",
    "reason_against",
    "rotate_unit",
    "sign_words",
    "silu_mul_hadamard_dynamic_quant",
    "silu_mul_hadamard_quant",
]

INNER = 64  # order of the butterflies
MOST_LINES = 256  # of X: a block of 16 warps, 16 lines each
TILE = 16  # lines of a product, and of a step of it
WARPS = 16  # on a multiprocessor: 128 registers for a thread, enough to fetch a row ahead
STEPS_OF_A_WORD = 4
BUFFERS = 2
ALIGNMENT = 16  # bytes of an access
DTYPES = (torch.bfloat16, torch.float16)
# From so many rows on the kernel is faster than Triton's (`benchmarks/elementwise_backends.py` on an NVIDIA H200).
STATIC_ROWS, DYNAMIC_ROWS, GATED_ROWS = 16, 1, 64
SMALL_LINES = 64  # up to which Triton's two small products are as fast at any number of rows, SwiGLU apart


def reason_against(width: int, dtype: torch.dtype, gathers: bool = False) -> str | None:
    """Why the kernel does not rotate rows of a width; None if it does."""
    if dtype not in DTYPES:
        return f"the CUDA kernel rotates bfloat16 and float16, not {dtype}"
    if gathers:
        return "the CUDA kernel gathers no codes"
    built = rotation(width)
    if not built.is_hadamard or built.power % INNER or width // INNER > MOST_LINES:
        return f"the CUDA kernel has no cut of width {width} ({built.name})"
    return None


def pays(width: int, rows: int, *, gated: bool, dynamic: bool) -> bool:
    """Whether the kernel is faster than Triton's for so many rows."""
    if gated:
        return rows >= GATED_ROWS
    return width // INNER > SMALL_LINES and rows >= (DYNAMIC_ROWS if dynamic else STATIC_ROWS)


def rotate_unit(
    width: int,
    dtype: torch.dtype,
    bits: int,
    *,
    gated: bool,
    dynamic: bool,
    multiplier: int = 0,
    shift: int = 0,
    blocks: int | None = None,
) -> Unit:
    """The kernel for rows of `width` rotated values. Kinds of vectors: 0 none, 1 one element, 2 one for each code.

    `blocks` on a multiprocessor; more than fit with a row fetched ahead fetch none.
    """
    lines = width // INNER
    usual = max(1, WARPS // warps(lines))
    return Unit(
        "rotate.cu",
        (
            ("MQ_LINES", lines),
            ("MQ_HALF", int(dtype == torch.float16)),
            ("MQ_GATED", int(gated)),
            ("MQ_DYNAMIC", int(dynamic)),
            ("MQ_BITS", bits),
            ("MQ_MULTIPLIER", multiplier),
            ("MQ_SHIFT", shift),
            ("MQ_BLOCKS", blocks or usual),
            ("MQ_AHEAD", int((blocks or usual) <= usual)),
        ),
    )


def warps(lines: int) -> int:
    """Warps of a block, the same formula as in the kernel."""
    return -(-lines // TILE)


def sign_words(width: int) -> Tensor:
    """Signs of the outer factor's transpose, int32 (warps, words, 32): `operand` of the kernel says where each lies.

    Lane (g, t) of warp w holds, for step k of the product, word i: line 16 w + g + 8 (i % 2), columns c and c + 1 with
    c = 16 k + 2 t + 8 (i // 2). Bit p = 4 (k % 4) + i of word k // 4 is the sign of column c, bit p + 16 of c + 1.
    """
    outer, _ = sign_factors(width, INNER)
    lines = outer.shape[0]
    tiles = warps(lines)
    words = -(-tiles // STEPS_OF_A_WORD)
    negative = torch.zeros(TILE * tiles, TILE * STEPS_OF_A_WORD * words, dtype=torch.int64)
    negative[:lines, :lines] = outer.t() < 0
    # axes: warp, i % 2, g; word, step in it, i // 2, t, column of a pair
    parts = negative.reshape(tiles, 2, 8, words, STEPS_OF_A_WORD, 2, 4, 2)
    parts = parts.permute(0, 3, 2, 6, 7, 4, 5, 1)  # warp, word, g, t; bits: column of a pair, then p
    bits = parts.reshape(tiles, words, 32, 32) << torch.arange(32)
    total = bits.sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def hadamard_quant(x: Tensor, multiplier: Tensor, shift: Tensor | None, bits: int) -> Tensor:
    """`hadamard_quant` of checked arguments, without a gather."""
    return _static(x, multiplier, shift, bits, gated=False)


def silu_mul_hadamard_quant(
    gate_up: Tensor, multiplier: Tensor, shift: Tensor | None, bits: int, *, blocks: int | None = None
) -> Tensor:
    """`silu_mul_hadamard_quant` of checked arguments, without a gather; `blocks` as for `rotate_unit`."""
    return _static(gate_up, multiplier, shift, bits, gated=True, blocks=blocks)


def hadamard_dynamic_quant(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`hadamard_dynamic_quant` of checked arguments."""
    return _dynamic(x, clip_ratio, bits, gated=False)


def silu_mul_hadamard_dynamic_quant(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`silu_mul_hadamard_dynamic_quant` of checked arguments."""
    return _dynamic(gate_up, clip_ratio, bits, gated=True)


def _static(
    x: Tensor, multiplier: Tensor, shift: Tensor | None, bits: int, *, gated: bool, blocks: int | None = None
) -> Tensor:
    width = x.shape[-1] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], width), dtype=torch.int8)
    kinds = {"multiplier": _kind(multiplier), "shift": _kind(shift)}
    unit = rotate_unit(width, x.dtype, bits, gated=gated, dynamic=False, blocks=blocks, **kinds)
    _launch(unit, x, width, multiplier.contiguous(), None if shift is None else shift.contiguous(), out, None, 0.0)
    return out


def _dynamic(x: Tensor, clip_ratio: float, bits: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    width = x.shape[-1] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], width), dtype=torch.int8)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    unit = rotate_unit(width, x.dtype, bits, gated=gated, dynamic=True)
    _launch(unit, x, width, None, None, out, scales, clip_ratio / IntegerGrid(bits).high)
    return out, scales


def _kind(vector: Tensor | None) -> int:
    return 0 if vector is None else 1 if vector.shape[0] == 1 else 2


@cache
def _signs(width: int, device: torch.device) -> Tensor:
    return sign_words(width).to(device)


def _launch(
    unit: Unit,
    x: Tensor,
    width: int,
    multiplier: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    share: float,
) -> None:
    if out.numel() == 0:
        return
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % ALIGNMENT:
        rows = rows.clone()
    tiles = warps(width // INNER)
    blocks = min(rows.shape[0], int(dict(unit.defines)["MQ_BLOCKS"]) * multiprocessors(x.device))
    arguments = (rows, _signs(width, x.device), multiplier, shift, out, scales)
    kernel(unit, "rotate", x.device).launch(
        (blocks, 1, 1),
        32 * tiles,
        (*arguments, rows.shape[0], width**-0.5, share, SMALLEST_SCALE),
        shared=BUFFERS * TILE * tiles * INNER * x.element_size(),
        overlap=overlaps(x.device),
    )
