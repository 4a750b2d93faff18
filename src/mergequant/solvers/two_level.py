"""RTN and GPTQ onto two-level integers (QServe: GPTQ at the last level, on integer steps that are found beforehand)."""

import torch
from torch import Tensor

from mergequant.grids import TwoLevelQuantizer, TwoLevelTensor
from mergequant.grids.two_level import first_level
from mergequant.solvers.rounding import Solution
from mergequant.solvers.sweep import InverseFactor, sweep

__all__ = ["two_level"]


def two_level(weight: Tensor, inverse: InverseFactor | None, quantizer: TwoLevelQuantizer) -> Solution:
    """Round a weight (outputs, width): to the nearest code, or with error feedback where a Hessian is given.

    Scale, steps and zeros are those of the original weight, so that any order leaves groups of neighbours; what GPTQ
    pushes onto a column is held within the protective range.

    Raises:
        UsageError: the group size does not divide the width.
    """
    weight = weight.float()
    if inverse is None:
        return Solution(quantizer.encode(weight))
    alive = torch.where(inverse.dead, torch.zeros_like(weight), weight)
    plain = quantizer.encode(alive)
    scale = plain.scale[:, 0]
    steps, zeros = plain.group_scale.float().t().contiguous(), plain.group_zero.float().t().contiguous()
    size = weight.shape[1] // steps.shape[0]
    codes = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)

    def quantize_column(column: int, values: Tensor) -> Tensor:
        step, zero = steps[column // size], zeros[column // size]
        code = plain.grid.nearest(first_level(values, scale) / step + zero)
        codes[column] = code.to(torch.int8)
        return (code - zero) * step * scale

    sweep(alive, inverse, quantize_column)
    made = TwoLevelTensor(codes.t().contiguous(), plain.scale, plain.grid, plain.group_scale, plain.group_zero)
    return Solution(made, inverse.damping, inverse.attempts)
