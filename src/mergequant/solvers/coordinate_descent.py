"""Cyclic coordinate descent on rounded weights: one column after the other takes its best value, the others held.

"QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885. With D = W - What, the best
unrounded value of column j is

    beta_j = W_j + sum_{k != j} D_k S_kj / S_jj        (S = X X^T, the raw sum: neither damped nor averaged)

and rounding it to the grid gives the best value that the grid has. From a point on the grid the objective
||(W - What) X||^2 never rises; relaxed sweeps, which do not round, let the search leave a poor minimum. As
`solvers/sweep.py`, this knows nothing of grids: a callback maps a column to its quantized values.

The released `quantease_outlier` loop never quantizes (it writes new columns into a temporary), so the outlier-aware
form follows the paper's text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import Outliers, Quantizer, SparseTensor
from mergequant.solvers.columns import ColumnQuantizer, GridColumns, block_kernel
from mergequant.solvers.rounding import Solution, gptq
from mergequant.solvers.sweep import invert_hessian

__all__ = ["Descent", "OutlierShare", "descend", "quantease", "quantease_outliers"]

RELAXED_EVERY = 3
LAST_RELAXED = 25
SMALLEST_SCALE = 6e-8  # of a float16
POWER_ROUNDS = 24  # of the power iteration for the largest eigenvalue, which sets a step that may be a little too short


@dataclass(frozen=True)
class Descent:
    """How coordinate descent goes.

    Attributes:
        start: "float" (the paper's: the weight itself), "rtn", or "gptq", whose result is then polished.
        sweeps: passes over all columns.
        relax: leave out the rounding in sweeps 1, 4, ..., 25, but never in the last.
        activation_order: visit columns by falling energy of their input.
        damping: of the GPTQ that is the start; descent itself needs none.
    """

    start: Literal["float", "rtn", "gptq"] = "float"
    sweeps: int = 30
    relax: bool = True
    activation_order: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.start not in ("float", "rtn", "gptq") or self.sweeps < 1:
            raise UsageError(f"descent needs at least one sweep and a start of float, rtn or gptq, got {self}")

    def relaxes(self, sweep: int) -> bool:
        """Whether a sweep leaves its columns unrounded."""
        return self.relax and sweep % RELAXED_EVERY == 1 and sweep <= LAST_RELAXED and sweep < self.sweeps - 1


def descend(
    weight: Tensor,
    gram: Tensor,
    round_column: ColumnQuantizer,
    descent: Descent,
    *,
    start: Tensor | None = None,
    block: int = 128,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Quantize all columns of a weight (rows, width); float64 weights are worked on in float64, others in float32.

    Args:
        weight: target (rows, width); not modified.
        gram: raw sum of x x^T (width, width).
        round_column: called with the original column number and its best values (rows,); returns the values that the
            stored codes stand for. It may be called with a column many times.
        descent: sweeps and order; its `start` is not read.
        start: where to begin (rows, width); None = at the weight.
        block: columns updated together; the result does not depend on it up to rounding.
        after: called with the values (rows, width) after every sweep; returns the target of the next one.

    Returns:
        Values (rows, width) after the last sweep, all of them results of `round_column`.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    diagonal = torch.diagonal(gram)
    order = torch.arange(gram.shape[0], device=gram.device)
    if descent.activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    # Row j holds S_jk / S_jj without k = j. A channel without input has no say: its column is rounded as it is.
    share = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))
    ratios = (gram * share[:, None])[order][:, order].to(dtype).fill_diagonal_(0)
    numbers = order.tolist()
    target = weight.to(dtype).t()[order].contiguous()  # (width, rows): a column is one contiguous row
    values = target.clone() if start is None else start.to(dtype).t()[order].contiguous()
    restored = torch.empty_like(values)
    for sweep in range(descent.sweeps):
        relaxed = descent.relaxes(sweep)
        moved = _sweep(target, values, ratios, numbers, None if relaxed else round_column, block)
        restored[order] = values
        if after is not None:
            target = after(restored.t()).t()[order].contiguous()
        elif not moved and not any(descent.relaxes(later) for later in range(sweep, descent.sweeps)):
            break  # no column has a better value
    return restored.t().contiguous()


def quantease(weight: Tensor, gram: Tensor, quantizer: Quantizer, descent: Descent | None = None) -> Solution:
    """Coordinate descent on an integer grid whose scales are those of the original weight throughout.

    Args:
        weight: float (outputs, width).
        gram: raw sum of x x^T over calibration inputs (width, width).
        quantizer: grid, scales per row or group, and how ranges are found.
        descent: start, sweeps, order; None = the paper's.

    Raises:
        UsageError: the group size does not divide the width.
        NumericsError: the Hessian of a GPTQ start cannot be factored.
    """
    descent = descent or Descent()
    weight = _alive(weight, gram)
    first = Solution(quantizer.encode(weight))
    if descent.start == "gptq":
        inverse = invert_hessian(gram, damping=descent.damping, activation_order=True)
        first = gptq(weight, inverse, quantizer)
    grids = quantizer.find(weight)
    begin = None if descent.start == "float" else first.quantized.decode()
    values = descend(weight, gram, GridColumns(quantizer.grid, *grids, weight.shape[1]), descent, start=begin)
    return Solution(quantizer.encode(values, *grids), first.damping, first.attempts)


@dataclass(frozen=True)
class OutlierShare:
    """What stays in floating point beside the codes.

    Attributes:
        share: of all weights, or of all columns.
        structured: whole columns, the same in all rows, else single weights anywhere.
    """

    share: float
    structured: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"outliers: share {self.share} must be between 0 and 1")


def quantease_outliers(
    weight: Tensor, gram: Tensor, quantizer: Quantizer, outliers: OutlierShare, descent: Descent | None = None
) -> Solution:
    """Outlier-aware coordinate descent: W ~ What + H, with few weights in H, which are free.

    H begins with the largest weights (or columns), the grid is fitted without them, then sweeps on What take turns with
    projected gradient steps on H (iterative hard thresholding), which may move its support. What is 0 in the columns of
    a structured H.

    Args:
        weight, gram, quantizer: as in `quantease`.
        outliers: how many, and where they may lie.
        descent: start "float" begins at W - H, "rtn" at its rounding; "gptq" is refused, since H would change under it.

    Returns:
        A `SparseTensor`: codes, scales and zero points that 16 bits hold, and H, in 16 bits.

    Raises:
        UsageError: a GPTQ start, or a share that keeps no weight or all of them.
    """
    descent = descent or Descent()
    if descent.start == "gptq":
        raise UsageError("outlier-aware descent starts from float or rtn: GPTQ would have rounded the outliers already")
    weight = _alive(weight, gram)
    width = weight.shape[1]
    count = round(outliers.share * (width if outliers.structured else weight.numel()))
    if not 0 < count < (width if outliers.structured else weight.numel()):
        raise UsageError(f"outliers: a share of {outliers.share} keeps {count} of {tuple(weight.shape)} weights")
    held = _largest(weight, count, outliers.structured)
    grids = quantizer.find(_inner(weight, held, quantizer, outliers))
    grids = grids[0].clamp_min(SMALLEST_SCALE).half().float(), grids[1]
    nearest = GridColumns(quantizer.grid, *grids, width)
    system = gram.float()
    step = 1 / _largest_eigenvalue(gram)

    def update(values: Tensor) -> Tensor:
        nonlocal held
        wanted = held + step * ((weight - values - held) @ system)
        held = _largest(wanted, count, outliers.structured)
        return weight - held

    begin = quantizer.encode(weight - held, *grids).decode() if descent.start == "rtn" else None
    values = descend(weight - held, gram, nearest, descent, start=begin, after=update)
    quantized = quantizer.encode(values, *grids)
    if outliers.structured:
        # What a column's codes stand for moves into H, which is free there: no code is read where a float is.
        inside = held.abs().amax(0) > 0
        held = torch.where(inside, held + quantized.decode(), torch.zeros_like(held))
        quantized = quantizer.encode(torch.where(inside, torch.zeros_like(values), values), *grids)
        sparse = Outliers.whole(held, inside.nonzero()[:, 0])
    else:
        sparse = Outliers.single(held, held != 0)
    zero = None if grids[1] is None else grids[1].float()
    return Solution(SparseTensor(quantized.codes, grids[0], quantized.grid, zero, outliers=sparse))


def _sweep(
    target: Tensor, values: Tensor, ratios: Tensor, numbers: list[int], rounded: ColumnQuantizer | None, block: int
) -> bool:
    """One pass over all columns (width, rows), in place; whether any value changed."""
    best = target + ratios @ (target - values)
    moved = torch.zeros((), dtype=torch.bool, device=values.device)
    width = values.shape[0]
    at_once = block_kernel(rounded, best, block)
    for first in range(0, width, block):
        last = min(first + block, width)
        if at_once is not None:
            before = values[first:last]
            values[first:last], steps = at_once(
                numbers[first:last], best[first:last], ratios[first:last, first:last], before=before
            )
            best[last:] += ratios[last:, first:last] @ steps
            moved |= steps.any()
            continue
        own, steps = best[first:last], torch.empty_like(best[first:last])
        local = ratios[first:last, first:last].t().contiguous()  # row i: what column i does to the others
        for i in range(last - first):
            value = own[i] if rounded is None else rounded(numbers[first + i], own[i])
            torch.sub(values[first + i], value, out=steps[i])
            values[first + i] = value
            own[i + 1 :].addr_(local[i, i + 1 :], steps[i])
        best[last:] += ratios[last:, first:last] @ steps
        moved |= steps.any()
    return bool(moved)


def _alive(weight: Tensor, gram: Tensor) -> Tensor:
    """The weight without the columns that never see an input: they would only widen ranges."""
    return torch.where(torch.diagonal(gram) > 0, weight.float(), torch.zeros_like(weight, dtype=torch.float32))


def _largest(values: Tensor, count: int, structured: bool) -> Tensor:
    """The `count` largest weights or columns, zeros elsewhere."""
    sizes = values.square().sum(0) if structured else values.abs().flatten()
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[torch.topk(sizes, count).indices] = True
    return torch.where(kept if structured else kept.view_as(values), values, torch.zeros_like(values))


def _inner(weight: Tensor, held: Tensor, quantizer: Quantizer, outliers: OutlierShare) -> Tensor:
    """Weights that set the ranges: without outlier columns, or without the tails of every row or group."""
    if outliers.structured:
        return weight - held
    grouped = weight.reshape(weight.shape[0], quantizer.groups(weight.shape[1]), -1)
    ranks = grouped.argsort(-1).argsort(-1)
    tail = round(grouped.shape[-1] * outliers.share / 2)
    inside = (ranks >= tail) & (ranks < grouped.shape[-1] - tail)
    return torch.where(inside, grouped, torch.zeros_like(grouped)).reshape(weight.shape)


def _largest_eigenvalue(gram: Tensor) -> float:
    """Of a positive semidefinite matrix, by power iteration."""
    vector = torch.diagonal(gram).sqrt()
    for _ in range(POWER_ROUNDS):
        vector = gram @ (vector / vector.norm().clamp_min(1e-300))
    return max(float(vector.norm()), 1e-300)
