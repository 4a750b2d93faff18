"""One block of columns, fixed one after the other, in a single kernel: the inner loop of GPTQ and coordinate descent.

The rows of a weight do not know of each other, so a lane takes a row through all columns of the block and keeps what
each column has left over. Launched one operation at a time, these loops wait for the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_COLUMNS", "Kept", "fix_columns"]

MOST_COLUMNS = 128  # of a block: registers of a thread
ROWS = 32  # of a program: one for each lane of its warp
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bit for fractions


@triton.jit
def _nearest(scaled, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Nearest integer in LOW..HIGH, ties to even, as a float."""
    kept = tl.minimum(tl.maximum(scaled, LOW), HIGH)
    return (kept + ROUNDER) - ROUNDER


@triton.jit
def _fix(
    target,  # (columns, rows): values that the block begins with
    before,  # (columns, rows), or None: GPTQ
    factors,  # (columns, columns): row i is what the steps of columns k < i add to column i
    pivots,  # (columns,), of GPTQ
    groups,  # int32 (columns,): which line of `scale` and `zero` a column has
    scale,  # (lines, rows), or None: nothing is rounded
    zero,
    kept,  # int8 (columns, rows), or None: 1 where a weight is an outlier whatever its error
    values,
    steps,
    codes,  # int8 (columns, rows), and what outliers have beside them; None: there are none
    residual,
    mask,
    limit,  # of a squared step, above which a weight is an outlier
    rows,
    columns,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LARGEST: tl.constexpr,  # of a residual
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    OUTLIERS: tl.constexpr = codes is not None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    k = tl.arange(0, COLUMNS)
    left = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for i in range(columns):
        at = tl.cast(i, tl.int64) * rows + row
        factor = tl.load(factors + i * columns + k, mask=k < i, other=0.0)
        best = tl.load(target + at, mask=inside, other=0.0) + tl.sum(left * factor[:, None], 0)
        value = best
        if scale is not None:
            line = tl.load(groups + i).to(tl.int64) * rows + row
            own = tl.load(scale + line, mask=inside, other=1.0)
            scaled = tl.div_rn(best, tl.where(own > 0, own, 1.0))
            offset = tl.zeros((ROWS,), dtype=tl.float32)
            if zero is not None:
                offset = tl.load(zero + line, mask=inside, other=0.0)
            code = _nearest(scaled + offset, LOW, HIGH)
            value = (code - offset) * own
            if OUTLIERS:
                if kept is not None:
                    out = tl.load(kept + at, mask=inside, other=0) != 0
                else:
                    error = tl.div_rn(best - value, tl.load(pivots + i))
                    out = error * error > limit
                code = tl.where(out, _nearest(offset, LOW, HIGH), code)
                value = (code - offset) * own
                rest = tl.where(out, best - value, 0.0)
                rest = tl.minimum(tl.maximum(rest, -LARGEST), LARGEST).to(tl.float16)
                value = value + rest.to(tl.float32)
                tl.store(codes + at, code.to(tl.int8), mask=inside)
                tl.store(residual + at, rest, mask=inside)
                tl.store(mask + at, out.to(tl.int8), mask=inside)
        if before is None:
            step = tl.div_rn(best - value, tl.load(pivots + i))
        else:
            step = tl.load(before + at, mask=inside, other=0.0) - value
        tl.store(values + at, value, mask=inside)
        tl.store(steps + at, step, mask=inside)
        left = tl.where((k == i)[:, None], step[None, :], left)


@dataclass(frozen=True, eq=False)
class Kept:
    """Outliers of a block, filled by `fix_columns`: the code stands for zero there, and the rest is stored beside it.

    Attributes:
        codes: int8 (columns, rows), of all weights.
        residual: float16 (columns, rows), zeros where there is no outlier.
        mask: bool (columns, rows), where they are.
        largest: of a residual's magnitude.
        limit: of the squared step; above it a weight is an outlier.
        chosen: bool (columns, rows), or None: outliers that somebody else has chosen; `limit` is not used then.
    """

    codes: Tensor
    residual: Tensor
    mask: Tensor
    largest: float
    limit: float = 0.0
    chosen: Tensor | None = None


def fix_columns(
    target: Tensor,
    factors: Tensor,
    *,
    before: Tensor | None = None,
    pivots: Tensor | None = None,
    groups: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    low: int = 0,
    high: int = 0,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Fix the columns of a block; float32 throughout.

    best_i = target_i + sum over k < i of step_k factors[i, k];   value_i = best_i on the grid, or best_i itself
    step_i = before_i - value_i, or without `before` (best_i - value_i) / pivots_i

    Args:
        target: (columns, rows), at most `MOST_COLUMNS`.
        factors: (columns, columns), read below the diagonal.
        before, pivots: (columns, rows), or (columns,).
        groups: int32 (columns,): line of `scale` and `zero` (lines, rows) of each column; without, nothing is rounded.
        low, high: ends of the grid.
        kept: where outliers go; None = there are none.

    Returns:
        Values and steps, (columns, rows) each.
    """
    columns, rows = target.shape
    values, steps = torch.empty_like(target), torch.empty_like(target)
    with torch.cuda.device(target.device) if target.is_cuda else torch.no_grad():
        _fix[(triton.cdiv(rows, ROWS),)](
            target,
            before,
            factors.contiguous(),
            pivots,
            groups,
            scale,
            zero,
            None if kept is None or kept.chosen is None else kept.chosen.view(torch.int8),
            values,
            steps,
            None if kept is None else kept.codes,
            None if kept is None else kept.residual,
            None if kept is None else kept.mask.view(torch.int8),
            0.0 if kept is None else kept.limit,
            rows,
            columns,
            LOW=float(low),
            HIGH=float(high),
            LARGEST=0.0 if kept is None else kept.largest,
            COLUMNS=max(16, triton.next_power_of_2(columns)),
            ROWS=ROWS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return values, steps
