"""`add_rmsnorm_quant` and `add_rmsnorm`: the residual stream takes a block's output, then the next norm.

residual <- residual + x, rounded to the residual's dtype; the norm reads the rounded sum. So each op equals the
addition followed by the norm bit for bit, and the fused kernel saves a trip of the residual through memory.
"""

import torch
from torch import Tensor

from mergequant.ops._elementwise import codes_like, first_for_gather, kernels_for
from mergequant.ops._register import register_mutating_op
from mergequant.ops._validate import require, require_float, require_quant_arguments, require_residual
from mergequant.ops.norm_quant import rmsnorm
from mergequant.ops.static_quant import quantize_scaled

__all__ = ["add_rmsnorm", "add_rmsnorm_quant"]


@register_mutating_op("residual")
def add_rmsnorm_quant(
    x: Tensor,
    residual: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
) -> Tensor:
    """residual <- residual + x, and the codes of `rmsnorm_quant` of the new residual.

    Args:
        x: (..., channels) float.
        residual: (..., channels) float, contiguous; updated in place.
        multiplier, index, shift, eps, bits: as `rmsnorm_quant`.

    Returns:
        int8 codes (..., width).

    Raises:
        KernelError: a dtype, shape, stride or device that is not as above.
    """
    require_residual("add_rmsnorm_quant", x, residual)
    require_quant_arguments("add_rmsnorm_quant", residual, multiplier, index, shift, bits)
    kernels = kernels_for("add_rmsnorm_quant", "norm_quant", residual, x, first=first_for_gather(x, index))
    if kernels is not None:
        result: Tensor = kernels.add_rmsnorm_quant(x, residual, multiplier, index, shift, eps, bits)
        return result
    residual.add_(x)
    return quantize_scaled(rmsnorm(residual, eps), multiplier, index, shift, bits)


@add_rmsnorm_quant.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
) -> Tensor:
    return codes_like(residual, residual.shape[-1] if index is None else index.shape[0])


@register_mutating_op("residual")
def add_rmsnorm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """residual <- residual + x, and residual / rms(residual) * weight + bias, in float32, rounded once at the end.

    Args:
        x: (..., channels) float, or None: nothing is added, the residual stays as it is.
        residual: (..., channels) float, contiguous; updated in place.
        weight: (channels,) float, the norm's gain.
        eps: added to the mean square.
        bias: optional float32 (channels,).

    Returns:
        (..., channels) of the residual's dtype.

    Raises:
        KernelError: a dtype, shape, stride or device that is not as above.
    """
    require_residual("add_rmsnorm", x, residual)
    require_float("add_rmsnorm", "weight", weight)
    channels = residual.shape[-1]
    require(
        weight.shape == (channels,), lambda: f"add_rmsnorm: weight has shape {tuple(weight.shape)}; pass ({channels},)"
    )
    require(
        weight.device == residual.device,
        lambda: f"add_rmsnorm: weight is on {weight.device}, residual on {residual.device}",
    )
    if bias is not None:
        require(
            bias.shape == (channels,) and bias.dtype == torch.float32 and bias.device == residual.device,
            lambda: (
                f"add_rmsnorm: bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; pass float32 "
                f"({channels},) on {residual.device}"
            ),
        )
    kernels = kernels_for("add_rmsnorm", "norm_quant", residual, x, weight)
    if kernels is not None:
        result: Tensor = kernels.add_rmsnorm(x, residual, weight, eps, bias)
        return result
    if x is not None:
        residual.add_(x)
    normed = rmsnorm(residual, eps) * weight.float()
    return (normed if bias is None else normed + bias).to(residual.dtype)


@add_rmsnorm.register_fake
def _(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    return torch.empty_like(residual)
