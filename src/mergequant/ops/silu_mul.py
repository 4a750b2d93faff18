"""`silu_mul`, `silu_mul_quant` and `silu_mul_dynamic_quant`: the SwiGLU of an MLP, and its codes.

gate_up holds the gates in the first half of its last axis and the ups in the second. y = gate / (1 + exp(-gate)) * up
in float32, in this order, as in the epilogue of `tiled_swiglu_quant`.
"""

import torch
from torch import Tensor

from mergequant.ops._elementwise import codes_like, kernels_for
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_dynamic_arguments, require_pairs, require_quant_arguments
from mergequant.ops.dynamic_quant import quantize_tokens
from mergequant.ops.static_quant import quantize_scaled

__all__ = ["silu_mul", "silu_mul_dynamic_quant", "silu_mul_quant"]


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@register_op
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (..., 2 width) float to (..., width) of the same dtype.

    Raises:
        KernelError: gate_up is no float tensor of an even width.
    """
    require_pairs("silu_mul", gate_up)
    kernels = kernels_for("silu_mul", "silu_mul", gate_up)
    if kernels is not None:
        result: Tensor = kernels.silu_mul(gate_up)
        return result
    return _swiglu(gate_up).to(gate_up.dtype)


@silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@register_op
def silu_mul_quant(
    gate_up: Tensor, multiplier: Tensor | None, index: Tensor | None, shift: Tensor | None, bits: int
) -> Tensor:
    """codes = clamp(round((silu(gate) * up)[index] * multiplier + shift)).

    Args:
        gate_up: (..., 2 channels) float.
        multiplier: optional float32 (width,) or (1,): 1/step of every code; None where the step is part of `up`.
        index: optional int32 (width,): channel that each code reads.
        shift: optional float32 (width,): in units of codes.
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., width).

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    require_pairs("silu_mul_quant", gate_up)
    channels = gate_up.shape[-1] // 2
    require_quant_arguments("silu_mul_quant", gate_up, multiplier, index, shift, bits, channels=channels)
    kernels = kernels_for("silu_mul_quant", "silu_mul", gate_up)
    if kernels is not None:
        result: Tensor = kernels.silu_mul_quant(gate_up, multiplier, index, shift, bits)
        return result
    return quantize_scaled(_swiglu(gate_up), multiplier, index, shift, bits)


@silu_mul_quant.register_fake
def _(gate_up: Tensor, multiplier: Tensor | None, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    return codes_like(gate_up, gate_up.shape[-1] // 2 if index is None else index.shape[0])


@register_op
def silu_mul_dynamic_quant(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of silu(gate) * up, which stays in float32.

    Args:
        gate_up: (..., 2 width) float.
        clip_ratio: fraction of the token's largest magnitude that the grid covers, in (0, 1].
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., width), and float32 scales (..., 1).

    Raises:
        KernelError: a dtype or value that is not as above.
    """
    require_pairs("silu_mul_dynamic_quant", gate_up)
    require_dynamic_arguments("silu_mul_dynamic_quant", gate_up, clip_ratio, bits)
    kernels = kernels_for("silu_mul_dynamic_quant", "silu_mul", gate_up)
    if kernels is not None:
        result: tuple[Tensor, Tensor] = kernels.silu_mul_dynamic_quant(gate_up, clip_ratio, bits)
        return result
    return quantize_tokens(_swiglu(gate_up), clip_ratio, bits)


@silu_mul_dynamic_quant.register_fake
def _(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return codes_like(gate_up, gate_up.shape[-1] // 2), gate_up.new_empty((*gate_up.shape[:-1], 1), dtype=torch.float32)
