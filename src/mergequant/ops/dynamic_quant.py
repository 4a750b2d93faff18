"""`dynamic_quant`: one scale per token, found at run time, times a static clip ratio (MergeQuant digest, step 6)."""

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops._validate import ACTIVATION_BITS, require, require_float

__all__ = ["dynamic_quant"]

SMALLEST_SCALE = 1e-12  # a token of zeros keeps finite codes (all zero)


@torch.library.custom_op("mergequant::dynamic_quant", mutates_args=())
def dynamic_quant(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize every token with its own scale, clip_ratio * absmax / high.

    Args:
        x: (..., width) float.
        clip_ratio: fraction of the token's largest magnitude that the grid covers, in (0, 1].
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., width), and float32 scales (..., 1).

    Raises:
        KernelError: a dtype or value that is not as above.
    """
    require_float("dynamic_quant", "x", x)
    require(bits in ACTIVATION_BITS, f"dynamic_quant: bits is {bits}; allowed are {ACTIVATION_BITS}")
    require(0 < clip_ratio <= 1, f"dynamic_quant: clip_ratio is {clip_ratio}; pass a value in (0, 1]")
    grid = IntegerGrid(bits)
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) * (clip_ratio / grid.high)).clamp_min(SMALLEST_SCALE)
    return grid.nearest(wide / scale).to(torch.int8), scale


@dynamic_quant.register_fake
def _(x: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
