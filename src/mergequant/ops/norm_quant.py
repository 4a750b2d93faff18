"""`rmsnorm_quant` and `layernorm_quant`: norms that emit integer codes (MergeQuant digest, step 2).

The division by the quantization step is part of the norm's own multiplier (gain / step), so that quantizing costs a
round and a clamp. Mean and variance are always those of the original channels, before any gather.
"""

import torch
from torch import Tensor

from mergequant.ops._elementwise import codes_like, first_for_gather, kernels_for
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_quant_arguments
from mergequant.ops.static_quant import quantize_scaled

__all__ = ["layernorm", "layernorm_quant", "rmsnorm", "rmsnorm_quant"]


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """Reference of the norm without its gain: x / rms(x), float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def layernorm(x: Tensor, eps: float) -> Tensor:
    """Reference of LayerNorm without gain and bias, float32."""
    wide = x.float()
    return rmsnorm(wide - wide.mean(-1, keepdim=True), eps)


@register_op
def rmsnorm_quant(
    x: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
    packed: bool = False,
) -> Tensor:
    """codes = clamp(round((x / rms(x))[index] * multiplier + shift)).

    Args:
        x: (..., channels) float; the norm runs in float32.
        multiplier: float32 (width,) or (1,): gain / step of every code.
        index: optional int32 (width,): channel that each code reads.
        shift: optional float32 (width,): staggered offsets, in units of codes.
        eps: added to the mean square.
        bits: width of the clamp, 2..8.
        packed: two codes a byte, the even column in the low nibble; up to 4 bits.

    Returns:
        int8 codes (..., width), or uint8 (..., width / 2) if packed.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    require_quant_arguments("rmsnorm_quant", x, multiplier, index, shift, bits, packed)
    kernels = kernels_for("rmsnorm_quant", "norm_quant", x, first=first_for_gather(x, index))
    if kernels is not None:
        result: Tensor = kernels.norm_quant(x, multiplier, index, shift, eps, bits, packed, centre=False)
        return result
    return quantize_scaled(rmsnorm(x, eps), multiplier, index, shift, bits, packed)


@register_op
def layernorm_quant(
    x: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
    packed: bool = False,
) -> Tensor:
    """codes = clamp(round(((x - mean) / std)[index] * multiplier + shift)).

    Arguments, result and errors as `rmsnorm_quant`; the norm's bias over the step is part of `shift`.
    """
    require_quant_arguments("layernorm_quant", x, multiplier, index, shift, bits, packed)
    kernels = kernels_for("layernorm_quant", "norm_quant", x, first=first_for_gather(x, index))
    if kernels is not None:
        result: Tensor = kernels.norm_quant(x, multiplier, index, shift, eps, bits, packed, centre=True)
        return result
    return quantize_scaled(layernorm(x, eps), multiplier, index, shift, bits, packed)


@rmsnorm_quant.register_fake
@layernorm_quant.register_fake
def _(
    x: Tensor,
    multiplier: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    eps: float,
    bits: int,
    packed: bool = False,
) -> Tensor:
    return codes_like(x, x.shape[-1] if index is None else index.shape[0], packed)
