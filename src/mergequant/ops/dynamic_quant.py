"""`dynamic_quant`: one scale per token, found at run time, times a static clip ratio (MergeQuant digest, step 6)."""

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops._elementwise import codes_like, kernels_for, pack_pairs
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_dynamic_arguments, require_packable

__all__ = ["SMALLEST_SCALE", "dynamic_quant", "quantize_tokens"]

SMALLEST_SCALE = 1e-12  # a token of zeros keeps finite codes (all zero)


def quantize_tokens(x: Tensor, clip_ratio: float, bits: int, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Reference of all dynamic quantizers. Float32 in; codes and float32 scales (..., 1) out."""
    grid = IntegerGrid(bits)
    scale = (x.abs().amax(-1, keepdim=True) * (clip_ratio / grid.high)).clamp_min(SMALLEST_SCALE)
    codes = grid.nearest(x / scale).to(torch.int8)
    return pack_pairs(codes) if packed else codes, scale


@register_op
def dynamic_quant(x: Tensor, clip_ratio: float, bits: int, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize every token with its own scale, clip_ratio * absmax / high.

    Args:
        x: (..., width) float.
        clip_ratio: fraction of the token's largest magnitude that the grid covers, in (0, 1].
        bits: width of the clamp, 2..8.
        packed: two codes a byte, the even column in the low nibble; up to 4 bits.

    Returns:
        int8 codes (..., width) or uint8 (..., width / 2) if packed, and float32 scales (..., 1).

    Raises:
        KernelError: a dtype or value that is not as above.
    """
    require_dynamic_arguments("dynamic_quant", x, clip_ratio, bits)
    if packed:
        require_packable("dynamic_quant", bits, x.shape[-1])
    kernels = kernels_for("dynamic_quant", "dynamic_quant", x)
    if kernels is not None:
        result: tuple[Tensor, Tensor] = kernels.dynamic_quant(x, clip_ratio, bits, packed)
        return result
    return quantize_tokens(x.float(), clip_ratio, bits, packed)


@dynamic_quant.register_fake
def _(x: Tensor, clip_ratio: float, bits: int, packed: bool = False) -> tuple[Tensor, Tensor]:
    return codes_like(x, x.shape[-1], packed), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
