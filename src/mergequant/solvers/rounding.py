"""RTN and GPTQ: a float weight becomes codes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import QTensor, Quantizer, ZeroTensor
from mergequant.grids.quantizer import nearest_code
from mergequant.solvers.columns import GridColumns
from mergequant.solvers.sweep import InverseFactor, invert_hessian, sweep

__all__ = ["Solution", "gptq", "output_error", "rtn"]


@dataclass(frozen=True)
class Solution:
    """A quantized weight and what it took.

    Attributes:
        quantized: codes and scales.
        damping: final damping of the Hessian; 0 for RTN.
        attempts: Cholesky factorizations; more than one means that the damping had to be raised.
    """

    quantized: QTensor
    damping: float = 0.0
    attempts: int = 0

    def rows(self, start: int, stop: int) -> "Solution":
        """Rows start..stop of the weight, as a solution of their own."""
        return Solution(self.quantized.rows(start, stop), self.damping, self.attempts)


def rtn(weight: Tensor, quantizer: Quantizer) -> Solution:
    """Round every weight to the nearest code. weight (outputs, width)."""
    return Solution(quantizer.encode(weight.float()))


def gptq(
    weight: Tensor,
    hessian: Tensor | InverseFactor,
    quantizer: Quantizer,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    static_groups: bool = True,
    block: int = 128,
) -> Solution:
    """GPTQ: round column by column with error feedback (arXiv 2210.17323).

    Args:
        weight: float (outputs, width).
        hessian: raw sum of x x^T over calibration inputs (width, width), or its factored inverse, which the layers of
            a site share.
        quantizer: integer grid, scales per row or group, and how ranges are found.
        damping: share of the mean diagonal added to the Hessian; raised until Cholesky succeeds.
        activation_order: quantize columns by falling diagonal.
        static_groups: with groups, find all scales beforehand from the original weights, so that any order leaves
            groups of neighbours. False: scales from compensated weights; needs the natural order.
        block: columns updated together.

    Raises:
        UsageError: dynamic groups together with activation order, or a group size that does not divide the width.
        NumericsError: the Hessian cannot be factored.
    """
    weight = weight.float()
    if isinstance(hessian, InverseFactor):
        inverse = hessian
    else:
        inverse = invert_hessian(hessian, damping=damping, activation_order=activation_order)
    natural = bool(torch.equal(inverse.order, torch.arange(weight.shape[1], device=inverse.order.device)))
    dynamic_groups = quantizer.group_size is not None and not static_groups
    if dynamic_groups and not natural:
        raise UsageError("groups that follow compensated weights need activation_order=False (or static_groups=True)")
    quantizer.groups(weight.shape[1])
    alive = torch.where(inverse.dead, torch.zeros_like(weight), weight)
    scale, zero = quantizer.find(alive)  # (outputs, groups)
    if not dynamic_groups:
        values, _ = sweep(alive, inverse, GridColumns(quantizer.grid, scale, zero, weight.shape[1]), block=block)
        return Solution(quantizer.encode(values, scale, zero), inverse.damping, inverse.attempts)
    size = quantizer.group_size or weight.shape[1]
    codes = torch.empty(weight.shape[::-1], dtype=torch.int8, device=weight.device)

    def quantize_column(column: int, values: Tensor) -> Tensor:
        group = column // size
        own = None if zero is None else zero[:, group]
        code = nearest_code(quantizer.grid, values / scale[:, group], own)
        codes[column] = (code if own is None else code + own).to(torch.int8)
        return quantizer.grid.value(code) * scale[:, group]

    def begin_group(position: int, values: Tensor) -> None:
        found, own = replace(quantizer, group_size=None).find(values)
        scale[:, position // size] = found[:, 0]
        if zero is not None and own is not None:
            zero[:, position // size] = own[:, 0]

    block = size * max(block // size, 1)
    sweep(alive, inverse, quantize_column, begin_group=begin_group, group_size=size, block=block)
    codes = codes.t().contiguous()
    grid = quantizer.grid
    made = QTensor(codes, scale, grid) if zero is None else ZeroTensor(codes, scale, grid, zero)
    return Solution(made, inverse.damping, inverse.attempts)


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T): summed squared output error of a weight difference D (outputs, width) on the Hessian's tokens."""
    difference = difference.to(hessian.dtype)
    return float(((difference @ hessian) * difference).sum())
