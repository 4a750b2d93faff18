"""Half-quadratic quantization: zero points (and scales) that leave few large errors, from the weights alone.

"Half-Quadratic Quantization of Large Machine Learning Models" (HQQ), Mobius Labs, 2023, public description. The error
is measured by a sum of |e|^p with p < 1, which forgives a few large errors: weights of the tail. Split into two:

    E = shrink(W - decoded)                     the errors that are to be forgiven, by a proximal step
    zero = mean of (code - (W - E) / scale)     what the codes say of the others, in closed form

taken in turn, with the penalty between them rising. Codes are nearest ones throughout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import IntegerGrid, Quantizer, ZeroTensor
from mergequant.grids.quantizer import SMALLEST_RANGE, nearest_code
from mergequant.solvers.rounding import Solution

__all__ = ["HalfQuadratic", "half_quadratic"]

LARGEST_ZERO = 1024  # in steps: beyond it a float16 knows no halves


@dataclass(frozen=True)
class HalfQuadratic:
    """How zero points are found; the description's own values.

    Attributes:
        norm: p.
        penalty: of the distance between E and the error, at first.
        growth: of the penalty, per iteration.
        iterations: at most; 0 = nearest codes between the smallest and the largest weight.
        scales: fit the scale to the codes, too, by least squares on W - E (the description leaves it alone).
    """

    norm: float = 0.7
    penalty: float = 10.0
    growth: float = 1.01
    iterations: int = 20
    scales: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1 or self.penalty <= 0 or self.growth < 1 or self.iterations < 0:
            raise UsageError(f"half-quadratic: 0 < norm <= 1, penalty > 0, growth >= 1 and iterations >= 0, got {self}")


def half_quadratic(
    weight: Tensor, bits: int, group_size: int | None = None, settings: HalfQuadratic = HalfQuadratic()
) -> Solution:
    """Quantize a weight (outputs, width) to codes with a scale and a real zero point (float16) per row or group.

    Each group keeps the zero point, and the scale, of its least error so far, so that none ends above where it began.

    Raises:
        UsageError: the group size does not divide the width.
    """
    grid = IntegerGrid(bits)
    groups = Quantizer(grid, group_size).groups(weight.shape[1])
    grouped = weight.float().reshape(weight.shape[0], groups, -1)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = torch.maximum((high - low) / (grid.high - grid.low), grouped.abs().amax(-1, keepdim=True) / LARGEST_ZERO)
    scale = torch.where(scale > SMALLEST_RANGE, scale, torch.ones_like(scale))
    zero = (grid.low - low / scale).half().float()
    best_scale, best_zero, least = scale, zero, torch.full_like(scale, torch.inf)
    penalty = settings.penalty
    for number in range(settings.iterations + 1):
        code = nearest_code(grid, grouped / scale, zero)  # less the zero point
        error = grouped - code * scale
        size = error.abs()
        loss = size.pow(settings.norm).sum(-1, keepdim=True)
        better = loss < least
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        least = torch.where(better, loss, least)
        if number == settings.iterations:
            break
        # One step towards the minimum of |e|^p + penalty / 2 (e - error)^2, from e = error.
        forgiven = (size - size.clamp_min(SMALLEST_RANGE).pow(settings.norm - 1) / penalty).clamp_min(0)
        kept = grouped - error.sign() * forgiven
        code = code + zero
        zero = (code - kept / scale).mean(-1, keepdim=True).clamp(-LARGEST_ZERO, LARGEST_ZERO).half().float()
        if settings.scales:
            centred = code - zero
            fitted = (centred * kept).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_min(1e-30)
            scale = torch.where(fitted > scale / 2, fitted, scale)  # codes of one value would let it collapse
        penalty *= settings.growth
    codes = (nearest_code(grid, grouped / best_scale, best_zero) + best_zero).reshape(weight.shape).to(torch.int8)
    return Solution(ZeroTensor(codes, best_scale[..., 0], grid, best_zero[..., 0].half()))
