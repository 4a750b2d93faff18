"""`hadamard_quant` and its kin: rotate online by `rotation(width)`, then quantize; `silu_mul_hadamard_...` of SwiGLU.

The rotated values stay in float32 between the two. The kernels rotate on tensor cores, the Triton one with sums that
are good to about 2^-17 of a row's scale, the CUDA one with float32 sums of exact products: a code may differ by one
from that of a float64 rotation where the value lies near a tie.
"""

from typing import Any

import torch
from torch import Tensor

from mergequant.ops import backends
from mergequant.ops._elementwise import backend_for, codes_like
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_dynamic_arguments, require_pairs, require_quant_arguments
from mergequant.ops.dynamic_quant import quantize_tokens
from mergequant.ops.hadamard import hadamard_transform
from mergequant.ops.silu_mul import silu_mul
from mergequant.ops.static_quant import quantize_scaled

__all__ = [
    "hadamard_dynamic_quant",
    "hadamard_quant",
    "silu_mul_hadamard_dynamic_quant",
    "silu_mul_hadamard_quant",
]


@register_op
def hadamard_quant(x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    """codes = clamp(round((x R)[index] * multiplier + shift)).

    Args:
        x: (..., in_width) float.
        multiplier: float32 (width,) or (1,): 1/step of every code.
        index: optional int32 (width,): rotated channel that each code reads; rotation and codes are then two kernels.
        shift: optional float32 (width,): in units of codes.
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., width).

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    require_quant_arguments("hadamard_quant", x, multiplier, index, shift, bits)
    backend = _backend("hadamard_quant", x, x.shape[-1], index is not None)
    if backend == "cuda":
        return _cuda().hadamard_quant(x, multiplier, shift, bits)
    if backend == "triton":
        return _triton().hadamard_quant(x, multiplier, index, shift, bits)
    return quantize_scaled(hadamard_transform(x).float(), multiplier, index, shift, bits)


@hadamard_quant.register_fake
def _(x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    return codes_like(x, x.shape[-1] if index is None else index.shape[0])


@register_op
def hadamard_dynamic_quant(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of x R.

    Args:
        x: (..., width) float.
        clip_ratio: fraction of the token's largest rotated magnitude that the grid covers, in (0, 1].
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., width), and float32 scales (..., 1).

    Raises:
        KernelError: a dtype or value that is not as above.
    """
    require_dynamic_arguments("hadamard_dynamic_quant", x, clip_ratio, bits)
    backend = _backend("hadamard_dynamic_quant", x, x.shape[-1])
    if backend != "torch":
        kernels = _cuda() if backend == "cuda" else _triton()
        return kernels.hadamard_dynamic_quant(x, clip_ratio, bits)
    return quantize_tokens(hadamard_transform(x).float(), clip_ratio, bits)


@hadamard_dynamic_quant.register_fake
def _(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return codes_like(x, x.shape[-1]), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@register_op
def silu_mul_hadamard_quant(
    gate_up: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int
) -> Tensor:
    """`hadamard_quant` of silu(gate) * up, which is rounded to the input's dtype as `silu_mul` rounds it.

    Args:
        gate_up: (..., 2 in_width) float: gates, then as many ups.
        multiplier, index, shift, bits: as for `hadamard_quant`.

    Returns:
        int8 codes (..., width).

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    op = "silu_mul_hadamard_quant"
    require_pairs(op, gate_up)
    channels = gate_up.shape[-1] // 2
    require_quant_arguments(op, gate_up, multiplier, index, shift, bits, channels=channels)
    if _backend(op, gate_up, channels, index is not None) == "cuda":
        return _cuda().silu_mul_hadamard_quant(gate_up, multiplier, shift, bits)
    return hadamard_quant(silu_mul(gate_up), multiplier, index, shift, bits)


@silu_mul_hadamard_quant.register_fake
def _(gate_up: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    return codes_like(gate_up, gate_up.shape[-1] // 2 if index is None else index.shape[0])


@register_op
def silu_mul_hadamard_dynamic_quant(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`hadamard_dynamic_quant` of silu(gate) * up, which is rounded to the input's dtype as `silu_mul` rounds it.

    Args:
        gate_up: (..., 2 width) float: gates, then as many ups.
        clip_ratio, bits: as for `hadamard_dynamic_quant`.

    Returns:
        int8 codes (..., width), and float32 scales (..., 1).

    Raises:
        KernelError: a dtype or value that is not as above.
    """
    op = "silu_mul_hadamard_dynamic_quant"
    require_pairs(op, gate_up)
    require_dynamic_arguments(op, gate_up, clip_ratio, bits)
    if _backend(op, gate_up, gate_up.shape[-1] // 2) == "cuda":
        return _cuda().silu_mul_hadamard_dynamic_quant(gate_up, clip_ratio, bits)
    return hadamard_dynamic_quant(silu_mul(gate_up), clip_ratio, bits)


@silu_mul_hadamard_dynamic_quant.register_fake
def _(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return codes_like(gate_up, gate_up.shape[-1] // 2), gate_up.new_empty((*gate_up.shape[:-1], 1), dtype=torch.float32)


def _cuda() -> Any:
    from mergequant.ops.cuda import rotate

    return rotate


def _triton() -> Any:
    from mergequant.ops.triton import hadamard_quant as kernels

    return kernels


def _backend(op: str, x: Tensor, width: int, gathers: bool = False) -> str:
    """The first backend of an op that takes these rows, of `width` rotated values; of others the reason is reported."""
    backend = backend_for(op, x)
    if backend == "cuda":
        reason = _cuda().reason_against(width, x.dtype, gathers)
        rows = x.numel() // max(x.shape[-1], 1)
        triton = backends.missing("triton") is None
        kind = {"gated": op.startswith("silu_mul"), "dynamic": "dynamic" in op}
        if reason is None and (backends.forced() or not triton or _cuda().pays(width, rows, **kind)):
            return backend
        backend = "triton" if triton and "triton" in backends.BACKENDS[op] else "torch"
        if reason is not None and x.dtype != torch.float32 and not gathers:  # which Triton is meant for
            backends.report_fallback(op, f"{reason}: {backend} runs")
    if backend == "triton":
        gpu = (torch.cuda.get_device_properties(x.device).shared_memory_per_multiprocessor,) if x.is_cuda else ()
        reason = _triton().reason_against(width, *gpu)
        if reason is not None:
            backends.report_fallback(op, f"{reason}: torch rotates, then quantizes")
            return "torch"
    return backend
