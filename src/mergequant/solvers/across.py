"""RTN, GPTQ and coordinate descent onto groups that run down a column (`grids/across.py`)."""

import torch
from torch import Tensor

from mergequant.grids import AcrossTensor, Quantizer, encode_across
from mergequant.grids.quantizer import nearest_code
from mergequant.solvers.coordinate_descent import Descent, descend
from mergequant.solvers.rounding import Solution
from mergequant.solvers.sweep import InverseFactor, sweep

__all__ = ["across", "across_descent"]


def across(weight: Tensor, inverse: InverseFactor | None, quantizer: Quantizer) -> Solution:
    """Round a weight (outputs, width) whose columns have scales of their own: to the nearest code, or by GPTQ.

    Scales of a column are those of its compensated values; they depend on no other column, so any order will do
    (AdaDim digest, GPTQ-ada).

    Args:
        weight: float (outputs, width).
        inverse: factored inverse of the Hessian; None = to the nearest code.
        quantizer: its group size counts outputs; None = the whole column.

    Raises:
        UsageError: the group size does not divide the outputs.
    """
    weight = weight.float()
    if inverse is None:
        return Solution(encode_across(weight, quantizer))
    groups = quantizer.groups(weight.shape[0])
    codes = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[1], groups, device=weight.device)
    zeros = torch.zeros_like(scale, dtype=torch.int8) if quantizer.zeros else None

    def quantize_column(column: int, values: Tensor) -> Tensor:
        found, zero = quantizer.find(values[None])
        made = quantizer.encode(values[None], found, zero)
        codes[column], scale[column] = made.codes[0], made.scale[0]
        if zeros is not None and zero is not None:
            zeros[column] = zero[0]
        return made.decode()[0]

    sweep(torch.where(inverse.dead, torch.zeros_like(weight), weight), inverse, quantize_column)
    turned = [None if part is None else part.t().contiguous() for part in (codes, scale, zeros)]
    made = AcrossTensor(turned[0], turned[1], quantizer.grid, turned[2])  # type: ignore[arg-type]
    return Solution(made, inverse.damping, inverse.attempts)


def across_descent(weight: Tensor, gram: Tensor, start: Solution, descent: Descent) -> Solution:
    """Polish a solution of `across` by coordinate descent that keeps its scales: the error never rises."""
    made = start.quantized
    if not isinstance(made, AcrossTensor):
        return start
    scale = made.scale.repeat_interleave(made.size, 0).t().contiguous()
    zero = None if made.zero is None else made.zero.repeat_interleave(made.size, 0).t().contiguous()
    codes = torch.empty(made.codes.shape[::-1], dtype=torch.int8, device=weight.device)

    def rounded(column: int, values: Tensor) -> Tensor:
        own = None if zero is None else zero[column]
        code = nearest_code(made.grid, values / scale[column], own)
        codes[column] = (code if own is None else code + own).to(torch.int8)
        return made.grid.value(code) * scale[column]

    alive = torch.where(torch.diagonal(gram) > 0, weight.float(), torch.zeros_like(weight, dtype=torch.float32))
    descend(alive, gram, rounded, descent, start=made.decode())
    solved = AcrossTensor(codes.t().contiguous(), made.scale, made.grid, made.zero)
    return Solution(solved, start.damping, start.attempts)
