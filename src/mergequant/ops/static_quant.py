"""`static_quant`: codes from a float tensor with scales that were fixed at calibration.

codes[..., j] = clamp(round(x[..., index[j]] * multiplier[j] + shift[j]))

The multiplier is 1/step; the step itself has migrated into the consumers' weights, so nothing is multiplied back.
"""

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops._elementwise import codes_like, kernels_for, pack_pairs
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_quant_arguments

__all__ = ["quantize_scaled", "static_quant"]


def quantize_scaled(
    x: Tensor, multiplier: Tensor | None, index: Tensor | None, shift: Tensor | None, bits: int, packed: bool = False
) -> Tensor:
    """Reference of all static quantizers: gather, multiply, shift, round, clamp. Float32 in, codes out."""
    scaled = x if index is None else x.index_select(-1, index)
    if multiplier is not None:
        scaled = scaled * multiplier
    if shift is not None:
        scaled = scaled + shift
    codes = IntegerGrid(bits).nearest(scaled).to(torch.int8)
    return pack_pairs(codes) if packed else codes


@register_op
def static_quant(
    x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int, packed: bool = False
) -> Tensor:
    """Quantize with static scales.

    Args:
        x: (..., in_width) float.
        multiplier: float32 (width,) or (1,): 1/step of every code.
        index: optional int32 (width,): channel of `x` that each code reads (reconstructed width).
        shift: optional float32 (width,): added before rounding (staggered offsets, biases), in units of codes.
        bits: width of the clamp, 2..8.
        packed: two codes a byte, the even column in the low nibble; up to 4 bits.

    Returns:
        int8 codes (..., width), or uint8 (..., width / 2) if packed.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    require_quant_arguments("static_quant", x, multiplier, index, shift, bits, packed)
    kernels = kernels_for("static_quant", "static_quant", x)
    if kernels is not None:
        result: Tensor = kernels.static_quant(x, multiplier, index, shift, bits, packed)
        return result
    return quantize_scaled(x.float(), multiplier, index, shift, bits, packed)


@static_quant.register_fake
def _(
    x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int, packed: bool = False
) -> Tensor:
    return codes_like(x, x.shape[-1] if index is None else index.shape[0], packed)
