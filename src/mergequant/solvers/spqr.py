"""SpQR: GPTQ onto tiny groups with quantized statistics, beside a few weights that are kept (arXiv 2306.03078).

The sweep itself is GPTQ's; here are its callbacks. At the start of a group its grid is fitted to the compensated
weights, without those that a leave-one-out test finds to spoil it. A column's weights whose error is still too large
are kept: the code stands for zero, and the rest is stored beside it (`grids/outliers.py`). What the sweep propagates is
what the stored parts decode to, to the last bit.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import IntegerGrid, Outliers, SecondLevel, SparseTensor
from mergequant.grids.second_level import LARGEST_STATISTIC, SMALLEST_STEP, decode_statistics, encode_statistics
from mergequant.solvers.columns import usable
from mergequant.solvers.rounding import Solution
from mergequant.solvers.sweep import InverseFactor, sweep

__all__ = ["SparseGroups", "spqr", "strongest"]

TEST_ELEMENTS = 1 << 24  # of a leave-one-out test at a time
RAISED = 2.0  # factor of a threshold that keeps too many weights
HALVINGS = 3  # of the interval in which the threshold is looked for
MOST_RAISES = 24
BLOCK = 128
SPQR_LEVEL = SecondLevel()


@dataclass(frozen=True)
class SparseGroups:
    """The dense part.

    Attributes:
        bits: bits of a code.
        group_size: columns, in the order of the sweep, that share scale and zero point; None = the row.
        second_level: how these are quantized; None = both are stored in 16 bits.
        whole_zeros: zero points are codes and grids include 0; False: any number, and a grid reaches from the smallest
            value to the largest.
    """

    bits: int = 3
    group_size: int | None = 16
    second_level: SecondLevel | None = SPQR_LEVEL
    whole_zeros: bool = False


def spqr(
    weight: Tensor,
    inverse: InverseFactor | None,
    groups: SparseGroups,
    *,
    threshold: float = 0.2,
    largest_share: float = 1.0,
    leave_one_out: bool = True,
    kept: Tensor | None = None,
) -> Solution:
    """Round a weight (outputs, width) to a `SparseTensor`.

    Args:
        weight: float (outputs, width).
        inverse: factored inverse Hessian of the inputs; None = to the nearest code, and only `kept` can be outliers.
        groups: the dense part.
        threshold: tau: a weight is an outlier if its error's share of the loss exceeds tau times the mean over columns
            of the rows' variance over the pivot's square. Larger = fewer; infinite = none.
        largest_share: most outliers, as a share of all weights: tau is raised (doubled, then halved in between) until
            they are no more.
        leave_one_out: outliers-to-be do not take part in their group's range (else: `simplified_outliers`).
        kept: bool (outputs, width), outliers that somebody else has chosen; the threshold is not used then.

    Raises:
        UsageError: a group size that does not divide the width.
    """
    weight = weight.float()
    rows, width = weight.shape
    size = groups.group_size or width
    if size < 1 or width % size:
        raise UsageError(f"group size {size} does not divide a row of {width} columns")
    if inverse is None or kept is not None:
        return _solve(weight, inverse, groups, None, leave_one_out, kept)
    pivots = torch.diagonal(inverse.factor)
    spread = weight[:, inverse.order].var(0) if rows > 1 else weight[:, inverse.order].square().mean(0)
    unit = float((spread / pivots.square()).mean())

    def attempt(tau: float) -> tuple[Solution, bool]:
        made = _solve(weight, inverse, groups, tau * unit, leave_one_out, None)
        stored = made.quantized
        count = stored.outliers.count if isinstance(stored, SparseTensor) and stored.outliers is not None else 0
        return made, count <= largest_share * weight.numel()

    best, fits = attempt(threshold)
    low = high = threshold
    for _ in range(MOST_RAISES):
        if fits:
            break
        low, high = high, high * RAISED
        best, fits = attempt(high)
    for _ in range(HALVINGS if high > low else 0):
        middle = (low + high) / 2
        found, fits = attempt(middle)
        if fits:
            best, high = found, middle
        else:
            low = middle
    return best


def strongest(score: Tensor, share: float) -> Tensor:
    """bool, true for exactly `share` of the scores, the highest ones; of equal ones, as many as are needed."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[torch.topk(score.flatten(), round(share * score.numel())).indices] = True
    return mask.reshape(score.shape)


def _solve(
    weight: Tensor,
    inverse: InverseFactor | None,
    groups: SparseGroups,
    limit: float | None,
    leave_one_out: bool,
    kept: Tensor | None,
) -> Solution:
    rows, width = weight.shape
    size = groups.group_size or width
    order = None if inverse is None else inverse.order
    state = _Columns(groups, size, rows, width, weight.device, limit=limit, leave_one_out=leave_one_out)
    if inverse is None:
        state.kept = None if kept is None else kept.t().contiguous()
        columns = weight.t().contiguous()
        for position in range(width):
            if position % size == 0:
                state.begin_group(position, columns[position : position + size].t())
            state.column(position, columns[position])
        return Solution(state.stored(None))
    state.pivots = torch.diagonal(inverse.factor).contiguous()
    state.kept = None if kept is None or order is None else kept.t()[order].contiguous()
    alive = torch.where(inverse.dead, torch.zeros_like(weight), weight)
    block = size * max(BLOCK // size, 1)
    at_once = state.group if usable(alive) and size <= BLOCK else None
    sweep(alive, inverse, state.column, begin_group=state.begin_group, group_size=size, fix_group=at_once, block=block)
    return Solution(state.stored(order), inverse.damping, inverse.attempts)


@dataclass
class _Columns:
    """Callbacks of one sweep, and what they have found so far, position by position."""

    groups: SparseGroups
    size: int
    rows: int
    width: int
    device: torch.device
    limit: float | None = None
    leave_one_out: bool = True
    kept: Tensor | None = None  # (width, rows), in sweep order
    pivots: Tensor | None = None
    position: int = 0
    found: list[tuple[Tensor, ...]] = field(default_factory=list)  # scale, zero; with a second level its parts

    def __post_init__(self) -> None:
        shape = self.width, self.rows
        self.grid = IntegerGrid(self.groups.bits)
        self.codes = torch.empty(shape, dtype=torch.int8, device=self.device)
        self.residual = torch.zeros(shape, dtype=torch.float16, device=self.device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=self.device)

    def begin_group(self, position: int, values: Tensor) -> None:
        """Fit the grid of the columns from `position` on to their compensated values (rows, size)."""
        without = torch.zeros_like(values, dtype=torch.bool)
        if self.kept is not None:
            without = self.kept[position : position + self.size].t()
        elif self.limit is not None and self.leave_one_out and self.pivots is not None:
            without = self._candidates(values, self.pivots[position : position + self.size])
        scale, zero = self._fit(values, without)
        level = self.groups.second_level
        if level is None:
            scale = scale.clamp(SMALLEST_STEP, LARGEST_STATISTIC).half().float()
            zero = zero.clamp(-LARGEST_STATISTIC, LARGEST_STATISTIC).half().float()
            self.found.append((scale, zero))
            return
        parts: list[Tensor] = []
        for statistic in (scale, zero):
            codes, grids = encode_statistics(statistic[:, None], level)
            parts += [codes[:, 0], grids[:, 0], decode_statistics(codes, grids, level.tile)[:, 0]]
        # A scale that its second level has brought to 0 would turn every weight into no number.
        scale = parts[2]
        self.found.append((scale, parts[5], parts[0], parts[3], torch.cat([parts[1], parts[4]], -1)))

    def column(self, _number: int, values: Tensor) -> Tensor:
        """Code the next position's compensated column (rows,); returns what the stored parts decode to."""
        position, (scale, zero) = self.position, self.found[-1][:2]
        self.position += 1
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = self.grid.nearest(values / divisor + zero)
        decoded = (codes - zero) * scale
        mask = None if self.kept is None else self.kept[position]
        if mask is None and self.limit is not None and self.pivots is not None:
            mask = ((values - decoded) / self.pivots[position]).square() > self.limit
        if mask is not None:
            codes = torch.where(mask, self.grid.nearest(zero), codes)
            decoded = (codes - zero) * scale
            rest = torch.where(mask, values - decoded, torch.zeros_like(values))
            rest = rest.clamp(-LARGEST_STATISTIC, LARGEST_STATISTIC).half()
            decoded = decoded + rest.float()
            self.residual[position], self.mask[position] = rest, mask
        self.codes[position] = codes.to(torch.int8)
        return decoded

    def group(self, position: int, values: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """`column` for a whole group (size, rows) at once, on a GPU: values, and errors over pivots."""
        from mergequant.ops.triton.columns import Kept, fix_columns

        own = slice(position, position + self.size)
        self.position = own.stop
        scale, zero = (part[None].contiguous() for part in self.found[-1][:2])
        outliers = Kept(
            self.codes[own],
            self.residual[own],
            self.mask[own],
            LARGEST_STATISTIC,
            math.inf if self.limit is None else self.limit,
            None if self.kept is None else self.kept[own],
        )
        return fix_columns(
            values.contiguous(),
            -factor.t(),
            pivots=torch.diagonal(factor).contiguous(),
            groups=torch.zeros(self.size, dtype=torch.int32, device=values.device),
            scale=scale,
            zero=zero,
            low=self.grid.low,
            high=self.grid.high,
            kept=outliers,
        )

    def stored(self, order: Tensor | None) -> SparseTensor:
        """All columns together."""
        level = self.groups.second_level
        scale, zero, *rest = (torch.stack(parts, 1) for parts in zip(*self.found, strict=True))
        residual, mask = self.residual, self.mask
        natural = order is None or bool(torch.equal(order, torch.arange(self.width, device=order.device)))
        if not natural:
            back = torch.argsort(order)  # type: ignore[arg-type]
            residual, mask = residual[back], mask[back]
        made = SparseTensor(
            self.codes.t().contiguous(),
            scale,
            self.grid,
            zero,
            None if natural else order,
            Outliers.single(residual.t().contiguous(), mask.t().contiguous()) if bool(mask.any()) else None,
        )
        if level is None:
            return made
        codes = torch.stack(rest[:2])
        return replace(made, statistic_codes=codes, statistics=rest[2], tile=level.tile, statistic_bits=level.bits)

    def _fit(self, values: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (rows,) of a group (rows, size), fitted without some of the values."""
        counts = (~without).sum(1, keepdim=True).clamp_min(1)
        mean = torch.where(without, torch.zeros_like(values), values).sum(1, keepdim=True) / counts
        low, high = _range(torch.where(without, mean, values))
        if self.groups.whole_zeros:
            low, high = low.clamp_max(0), high.clamp_min(0)
        spread = (high - low) / (self.grid.high - self.grid.low)
        # Any scale serves a constant group, whose zero point is real; one like its neighbours' spoils no second level.
        varied = spread > SMALLEST_STEP
        usual = spread[varied].mean() if bool(varied.any()) else torch.ones_like(spread[0])
        scale = torch.where(varied, spread, usual)
        zero = self.grid.low - low / scale
        return scale, self.grid.nearest(zero) if self.groups.whole_zeros else zero

    def _candidates(self, values: Tensor, pivots: Tensor) -> Tensor:
        """Weights (rows, size) without which the others of their group have so much less error."""
        size = values.shape[1]
        if size == 1 or self.limit is None:
            return torch.zeros_like(values, dtype=torch.bool)
        others = torch.tensor([[k for k in range(size) if k != i] for i in range(size)], device=values.device)
        found = []
        for part in values.split(max(TEST_ELEMENTS // size**2, 1)):
            whole = self._loss(part, pivots).sum(1, keepdim=True)
            left = self._loss(part[:, others], pivots[others]).sum(-1)  # (rows, size)
            found.append(whole - left > self.limit)
        return torch.cat(found)

    def _loss(self, values: Tensor, pivots: Tensor) -> Tensor:
        """Squared error over squared pivot of values (..., size) on the grid from their smallest to their largest."""
        low, high = (bound[..., None] for bound in _range(values))
        scale = ((high - low) / (self.grid.high - self.grid.low)).clamp_min(SMALLEST_STEP)
        zero = self.grid.low - low / scale
        return ((self.grid.nearest(values / scale + zero).sub_(zero).mul_(scale) - values) / pivots).square_()


def _range(values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(values, dim=-1)
    return low, high
