"""`hadamard_quant` and `hadamard_dynamic_quant`: rotate online by `rotation(width)`, then quantize.

The rotated values stay in float32 between the two. The Triton kernel rotates on tensor cores with sums that are good to
about 2^-17 of a row's scale: a code may differ by one from that of a float64 rotation where the value lies near a tie.
"""

import torch
from torch import Tensor

from mergequant.ops import backends
from mergequant.ops._elementwise import codes_like, use_triton
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_dynamic_arguments, require_quant_arguments
from mergequant.ops.dynamic_quant import quantize_tokens
from mergequant.ops.hadamard import hadamard_transform
from mergequant.ops.static_quant import quantize_scaled

__all__ = ["hadamard_dynamic_quant", "hadamard_quant"]


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
    if _fused("hadamard_quant", x):
        from mergequant.ops.triton import hadamard_quant as kernels

        return kernels.hadamard_quant(x, multiplier, index, shift, bits)
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
    if _fused("hadamard_dynamic_quant", x):
        from mergequant.ops.triton import hadamard_quant as kernels

        return kernels.hadamard_dynamic_quant(x, clip_ratio, bits)
    return quantize_tokens(hadamard_transform(x).float(), clip_ratio, bits)


@hadamard_dynamic_quant.register_fake
def _(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return codes_like(x, x.shape[-1]), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fused(op: str, x: Tensor) -> bool:
    if not use_triton(op, x):
        return False
    from mergequant.ops.triton import hadamard_quant as kernels

    gpu = (torch.cuda.get_device_properties(x.device).shared_memory_per_multiprocessor,) if x.is_cuda else ()
    reason = kernels.reason_against(x.shape[-1], *gpu)
    if reason is not None:
        backends.report_fallback(op, f"{reason}: torch rotates, then quantizes")
    return reason is None
