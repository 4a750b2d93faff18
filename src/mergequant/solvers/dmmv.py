"""Discrete min-max violation: values out of level sets for which the largest |A x - b| is small.

"Discrete Optimization of Min-Max Violation and its Applications Across Computational Sciences", arXiv 2508.13437,
solved by its heuristic (AMVM; digest): local search over swaps and single moves, which are ruled out by the few
constraints of largest violation before any is evaluated exactly, inside a large neighbourhood search. Rows are problems
of their own that share A; all of them are searched at once, on any device.

Where this differs from the reference code: the best of all moves is taken, single ones too (there: the first that
improves, in random order); the guard on the squared violation holds for every move and every repair (there: not for
greedy repair); tolerances are relative to the largest violation (there: 0.001); the budget is a number of moves, not
seconds, so that a run can be repeated.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from mergequant.errors import UsageError

__all__ = ["MinMaxProblem", "MinMaxSearch", "MinMaxSolution", "min_max_search"]

MoveName = Literal["swap", "swap_and_single"]

SCORES = (5.0, 2.0, 1.0, 0.5)  # of a destroy or repair move that made a new best, a better, an equal, a rejected state
SCORE_DECAY = 0.7
DISTANCE_DECAY = 0.3  # of a variable's say in a constraint, per level that it is away from the constraint's bound
SHARPNESS = 20.0  # of the soft maximum that picks candidates
ELEMENTS = 1 << 22  # of the largest intermediate tensor
CHUNK = 8  # moves evaluated exactly at a time


@dataclass(frozen=True)
class MinMaxProblem:
    """min over x of max_k |A_k x - b_k|, x_j one of the levels of variable j; one problem for every row.

    Attributes:
        matrix: A (constraints, variables), shared by all rows.
        target: b (rows, constraints).
        levels: ascending values (rows or 1, variables or 1, count); a shorter set ends with infinities.
        gram, cross: what the guard watches, x G x - 2 c x: (variables, variables), (rows, variables). By default
            A^T A and b A, so that it is the squared violation; other ones may stand for more constraints than A has.
    """

    matrix: Tensor
    target: Tensor
    levels: Tensor
    gram: Tensor | None = None
    cross: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = f"A {tuple(self.matrix.shape)}, b {tuple(self.target.shape)}, levels {tuple(self.levels.shape)}"
        if self.matrix.dim() != 2 or self.target.dim() != 2 or self.levels.dim() != 3:
            raise UsageError(f"min-max problem: needs A, b and levels of 2, 2 and 3 axes, got {shapes}")
        rows, variables = self.target.shape[0], self.matrix.shape[1]
        fits = self.levels.shape[0] in (1, rows) and self.levels.shape[1] in (1, variables) and self.levels.shape[2] > 0
        if self.target.shape[1] != self.matrix.shape[0] or not fits or 0 in (*self.target.shape, variables):
            raise UsageError(f"min-max problem: A, b and levels do not belong together: {shapes}")
        if bool((self.levels.diff() <= 0).any()) or not bool(torch.isfinite(self.levels[..., 0]).all()):
            raise UsageError("min-max problem: levels must be finite and ascending, infinities last; sort them")
        if (self.gram is None) != (self.cross is None):
            raise UsageError("min-max problem: gram and cross belong together; give both or none")

    @cached_property
    def quadratic(self) -> tuple[Tensor, Tensor]:
        """G and c of the guard."""
        if self.gram is None or self.cross is None:
            return self.matrix.t() @ self.matrix, self.target @ self.matrix
        return self.gram, self.cross

    @cached_property
    def columns(self) -> Tensor:
        """A transposed, with a column of zeros for a move that moves nothing (variables + 1, constraints)."""
        return torch.cat((self.matrix.t(), torch.zeros_like(self.matrix[:, :1]).t()))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and variables."""
        return self.target.shape[0], self.matrix.shape[1]

    def values(self, codes: Tensor) -> Tensor:
        """x (rows, variables) of codes, places in the level sets."""
        return self.levels.expand(*self.shape, -1).gather(-1, codes[..., None])[..., 0]

    def nearest(self, values: Tensor) -> Tensor:
        """Codes of the levels that are nearest to values (rows, variables): rounding, the plainest start."""
        return (self.levels.nan_to_num(posinf=torch.finfo(values.dtype).max) - values[..., None]).abs().argmin(-1)

    def violation(self, codes: Tensor) -> Tensor:
        """A x - b (rows, constraints)."""
        return self.values(codes) @ self.matrix.t() - self.target

    def rows(self, rows: Tensor | slice) -> "MinMaxProblem":
        """The problem of some rows."""
        levels = self.levels if self.levels.shape[0] == 1 else self.levels[rows]
        gram, cross = self.quadratic
        own = replace(self, target=self.target[rows], levels=levels, gram=gram, cross=cross[rows])
        own.__dict__["columns"] = self.columns  # made once
        return own


@dataclass(frozen=True)
class MinMaxSearch:
    """How to search.

    Attributes:
        moves: "swap" = one variable goes up a level and another, which is there, comes down for it (the paper's S);
            "swap_and_single" = or only one moves (W).
        guard: the squared violation may not grow.
        iterations: of destroying and repairing; 0 = local search alone.
        rate: share of the variables that are destroyed, at least one.
        active: constraints of largest violation by which moves are ruled out.
        candidates: variables that may go up, and that may come down, in a row's move: those that help the active
            constraints and the guard most; 0 = all, as in the paper.
        checks: moves of least lower bound that are evaluated exactly; 0 = until none of the rest can be better.
        rounds: most moves of a local search.
        tolerance: relative gain that a move must bring.
        seed: of all random choices; they are made on the CPU, the same for any device.
    """

    moves: MoveName = "swap"
    guard: bool = True
    iterations: int = 10
    rate: float = 0.005
    active: int = 100
    candidates: int = 0
    checks: int = 0
    rounds: int = 1000
    tolerance: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = self.iterations, self.candidates, self.checks, self.rounds
        if self.moves not in get_args(MoveName) or min(counts) < 0 or self.active < 1:
            raise UsageError(f"min-max search: moves are swap or swap_and_single, counts not negative, got {self}")
        if not 0 < self.rate <= 1 or not 0 <= self.tolerance < 1:
            raise UsageError(f"min-max search: rate must be in (0, 1] and tolerance in [0, 1), got {self}")


@dataclass
class MinMaxSolution:
    """Where a search stands.

    Attributes:
        codes: places in the level sets, int64 (rows, variables).
        violation: A x - b (rows, constraints).
        slope: half the guard's gradient, x G - c (rows, variables).
        energy: what the guard watches, less what it was at the start (rows,).
        moves: local moves made (rows,).
    """

    codes: Tensor
    violation: Tensor
    slope: Tensor
    energy: Tensor
    moves: Tensor

    @property
    def worst(self) -> Tensor:
        """Largest |violation| (rows,)."""
        return self.violation.abs().amax(-1)

    def take(self, rows: Tensor) -> "MinMaxSolution":
        """A copy of some rows."""
        return MinMaxSolution(*(part[rows] for part in vars(self).values()))

    def put(self, rows: Tensor, other: "MinMaxSolution") -> None:
        """Overwrite some rows."""
        for name, part in vars(self).items():
            part[rows] = getattr(other, name)


def min_max_search(problem: MinMaxProblem, start: Tensor, search: MinMaxSearch = MinMaxSearch()) -> MinMaxSolution:
    """Search every row from a start on.

    Args:
        problem: matrices and level sets, in a floating dtype.
        start: codes (rows, variables), for instance `problem.nearest` of the solution over the reals, or GPTQ's.
        search: moves and budget.

    Returns:
        The best state found; `worst` is never above that of the start, nor is the squared violation under the guard.

    Raises:
        UsageError: a start of another shape, or codes that have no level.
    """
    if tuple(start.shape) != problem.shape:
        raise UsageError(f"min-max search: start is {tuple(start.shape)}, the problem has {problem.shape}")
    count = problem.levels.shape[-1]
    if not bool(((start >= 0) & (start < count)).all()) or not bool(torch.isfinite(problem.values(start.long())).all()):
        raise UsageError(f"min-max search: start has codes outside 0..{count - 1}, or without a level")
    codes, zeros = start.long().clone(), torch.zeros_like(problem.target[:, 0])
    state = MinMaxSolution(codes, problem.violation(codes), _slope(problem, codes), zeros, zeros.long())
    _descend(problem, state, search)
    if search.iterations:
        _large_neighbourhoods(problem, state, search)
    return state


def _slope(problem: MinMaxProblem, codes: Tensor) -> Tensor:
    gram, cross = problem.quadratic
    return problem.values(codes) @ gram - cross


def _steps(problem: MinMaxProblem, codes: Tensor) -> tuple[Tensor, Tensor]:
    """What x gains one level up and loses one level down (rows, variables); infinite where there is none."""
    here, last = problem.values(codes), problem.levels.shape[-1] - 1
    up = torch.where(codes < last, problem.values((codes + 1).clamp_max(last)) - here, torch.inf)
    down = torch.where(codes > 0, here - problem.values((codes - 1).clamp_min(0)), torch.inf)
    return up, down


def _descend(problem: MinMaxProblem, state: MinMaxSolution, search: MinMaxSearch) -> None:
    """Local search, in place: the best move of every row, until a row has none."""
    rows, variables = problem.shape
    wide = min(search.candidates or variables, variables) + 1
    active = min(search.active, problem.matrix.shape[0])
    at_once = max(ELEMENTS // max(active * variables, wide * wide, CHUNK * problem.matrix.shape[0]), 1)
    alive = torch.arange(rows, device=problem.target.device)
    for _ in range(search.rounds):
        if not len(alive):
            return
        moved = []
        for part in alive.split(at_once):
            own = state.take(part)
            moved.append(part[_move(problem.rows(part), own, search)])
            state.put(part, own)
        alive = torch.cat(moved)


def _move(problem: MinMaxProblem, state: MinMaxSolution, search: MinMaxSearch) -> Tensor:
    """Make the best move of every row, in place; bool (rows,): those that had one."""
    worst = state.worst
    rising, falling = _candidates(problem, state, search, worst)
    bound = _bounds(problem, state, search, rising, falling)
    bound = torch.where(bound < worst[:, None] * (1 - search.tolerance), bound, torch.inf)
    most = min(search.checks or bound.shape[1], bound.shape[1])
    bound, place = bound.topk(most, dim=1, largest=False)
    best, chosen = worst * (1 - search.tolerance), torch.full_like(place[:, 0], -1)
    for start in range(0, most, CHUNK):
        rows = (bound[:, start] < best).nonzero()[:, 0]  # the others have their best move, or none
        if not len(rows):
            break
        own, possible = place[rows, start : start + CHUNK], bound[rows, start : start + CHUNK]
        up, down = rising.rows(rows).at(own // falling.count), falling.rows(rows).at(own % falling.count)
        exact = state.violation[rows, None] + problem.columns[up.variable] * up.step[..., None]
        exact = exact.sub_(problem.columns[down.variable].mul_(down.step[..., None])).abs_().amax(-1)
        least, which = torch.where(torch.isfinite(possible), exact, torch.inf).min(1)
        better = least < best[rows]
        best[rows] = torch.where(better, least, best[rows])
        chosen[rows] = torch.where(better, own.gather(1, which[:, None])[:, 0], chosen[rows])
    moved = chosen >= 0
    if bool(moved.any()):
        own = chosen.clamp_min(0)[:, None]
        _apply(problem, state, rising.at(own // falling.count), moved, 1)
        _apply(problem, state, falling.at(own % falling.count), moved, -1)
        state.moves += moved
    return moved


@dataclass
class _Moves:
    """Single moves of every row: variables (rows, count), the number of variables for none; and positive steps."""

    variable: Tensor
    step: Tensor

    @property
    def count(self) -> int:
        return self.variable.shape[1]

    def rows(self, rows: Tensor) -> "_Moves":
        return _Moves(self.variable[rows], self.step[rows])

    def at(self, place: Tensor) -> "_Moves":
        return _Moves(self.variable.gather(1, place), self.step.gather(1, place))


def _apply(problem: MinMaxProblem, state: MinMaxSolution, move: _Moves, rows: Tensor, sign: int) -> None:
    """Move one variable of each of some rows by a level."""
    gram, _ = problem.quadratic
    variable, step = move.variable[:, 0], move.step[:, 0] * sign
    moves = rows & (variable < problem.shape[1])
    variable, step = variable.clamp_max(problem.shape[1] - 1), torch.where(moves, step, 0.0)
    own = variable[:, None]
    state.energy += step * (2 * state.slope.gather(1, own)[:, 0] + step * torch.diagonal(gram)[variable])
    state.codes.scatter_add_(1, own, (sign * moves.long())[:, None])
    state.violation += step[:, None] * problem.columns[variable]
    state.slope += step[:, None] * gram[variable]


def _candidates(
    problem: MinMaxProblem, state: MinMaxSolution, search: MinMaxSearch, worst: Tensor
) -> tuple[_Moves, _Moves]:
    """Moves up and moves down; behind them, with single moves, one that moves nothing."""
    gram, _ = problem.quadratic
    up, down = _steps(problem, state.codes)
    rows, variables = up.shape
    count = min(search.candidates or variables, variables)
    made = []
    if count < variables:
        pull = torch.exp(SHARPNESS * (state.violation.abs() / worst[:, None].clamp_min(1e-30) - 1))
        pull = (pull * state.violation.sign()) @ problem.matrix / pull.sum(1, keepdim=True)
        curvature = torch.diagonal(gram)
    for step, sign in ((up, 1), (down, -1)):
        if count == variables:
            variable = torch.arange(variables, device=up.device).expand(rows, -1)
        else:
            impossible = ~torch.isfinite(step)
            wins = (-sign * step * pull).masked_fill(impossible, -torch.inf)
            variable = wins.topk(count, dim=1).indices
            if search.guard:  # the other half: those that pay for what the first ones spend
                first = variable[:, : count - count // 2]
                pays = (-step * (2 * sign * state.slope + step * curvature)).masked_fill(impossible, -torch.inf)
                pays.scatter_(1, first, -torch.inf)
                variable = torch.cat((first, pays.topk(count // 2, dim=1).indices), 1)
        picked = step.gather(1, variable)
        if search.moves == "swap_and_single":
            variable = torch.cat((variable, torch.full_like(variable[:, :1], variables)), 1)
            picked = torch.cat((picked, torch.zeros_like(picked[:, :1])), 1)
        made.append(_Moves(variable, picked))
    return made[0], made[1]


def _bounds(
    problem: MinMaxProblem, state: MinMaxSolution, search: MinMaxSearch, rising: _Moves, falling: _Moves
) -> Tensor:
    """Lower bounds (rows, pairs) of the largest violation after each pair of moves, by the active constraints alone;
    infinite for pairs that are no move, or that the guard forbids."""
    gram, _ = problem.quadratic
    variables = problem.shape[1]
    up, down = (torch.where(torch.isfinite(move.step), move.step, 0.0) for move in (rising, falling))
    places = [move.variable.clamp_max(variables - 1) for move in (rising, falling)]
    violation, active = state.violation.abs().topk(min(search.active, len(problem.matrix)), dim=1)
    violation = violation * state.violation.gather(1, active).sign()
    bound = torch.zeros(*up.shape, down.shape[1], dtype=up.dtype, device=up.device)
    for number in range(active.shape[1]):
        row = problem.matrix[active[:, number]]
        first = violation[:, number, None] + up * row.gather(1, places[0])
        second = down * row.gather(1, places[1])
        torch.maximum(bound, (first[:, :, None] - second[:, None]).abs_(), out=bound)
    singles = [move.variable == variables for move in (rising, falling)]
    codes = [state.codes.gather(1, place) for place in places]
    allowed = codes[1][:, None] == codes[0][:, :, None] + 1
    allowed |= singles[0][:, :, None] | singles[1][:, None]
    allowed &= torch.isfinite(rising.step)[:, :, None] & torch.isfinite(falling.step)[:, None]
    allowed &= rising.variable[:, :, None] != falling.variable[:, None]  # one that moves nothing twice, too
    if search.guard:
        diagonal = torch.diagonal(gram)
        slopes = [state.slope.gather(1, place) for place in places]
        cost = (up * (2 * slopes[0] + up * diagonal[places[0]]))[:, :, None]
        cost = cost + (down * (down * diagonal[places[1]] - 2 * slopes[1]))[:, None]
        cost -= 2 * up[:, :, None] * down[:, None] * gram[places[0][:, :, None], places[1][:, None]]
        allowed &= cost <= 0
    return bound.masked_fill_(~allowed, torch.inf).flatten(1)


def _large_neighbourhoods(problem: MinMaxProblem, state: MinMaxSolution, search: MinMaxSearch) -> None:
    """Destroy and repair, in place; moves are drawn by how well they did so far, and worse states are dropped."""
    rows, variables = problem.shape
    generator = torch.Generator().manual_seed(search.seed)
    device, every = problem.target.device, torch.arange(rows)
    size = max(round(search.rate * variables + 0.5), 1)
    weights = torch.full((2, rows, 2), SCORES[0])  # of two ways to destroy, and of two to repair
    for _ in range(search.iterations):
        drawn = torch.rand(2, rows, generator=generator) * weights.sum(-1)
        worst_first, greedy = (drawn[kind] > weights[kind, :, 0] for kind in (0, 1))
        noise = -torch.log(-torch.log(torch.rand(rows, variables, generator=generator).clamp(1e-9, 1 - 1e-7)))
        share = _share_in_worst(problem, state, search).clamp_min(1e-30).log()
        scores = noise.to(share) + torch.where(worst_first.to(device)[:, None], share, 0.0)
        removed = scores.topk(size, dim=1).indices  # drawn without replacement
        shifts = torch.randint(-1, 2, (rows, size), generator=generator).to(device)
        trial = state.take(every.to(device))
        _repair(problem, trial, removed, shifts, greedy.to(device))
        _descend(problem, trial, search)
        before, after = state.worst, trial.worst
        allowed = (trial.energy <= state.energy) if search.guard else torch.ones_like(after, dtype=torch.bool)
        better = allowed & (after < before * (1 - 1e-9))
        taken = allowed & (after <= before)
        score = torch.full((rows,), SCORES[3])
        score[taken.cpu()] = SCORES[2]
        score[better.cpu()] = SCORES[0]  # only better states are kept, so each of them is a new best
        for kind, choice in enumerate((worst_first.long(), greedy.long())):
            weights[kind, every, choice] = SCORE_DECAY * weights[kind, every, choice] + (1 - SCORE_DECAY) * score
        kept = taken.nonzero()[:, 0]
        state.put(kept, trial.take(kept))


def _share_in_worst(problem: MinMaxProblem, state: MinMaxSolution, search: MinMaxSearch) -> Tensor:
    """Say of every variable in the active constraints (rows, variables): a variable counts as much as it is near to
    the value at which the constraint is as large as the largest one."""
    up, down = _steps(problem, state.codes)
    step = torch.where(torch.isfinite(up), up, torch.where(torch.isfinite(down), down, 1.0))
    size, active = state.violation.abs().topk(min(search.active, len(problem.matrix)), dim=1)
    room = state.worst[:, None] - size
    total = torch.zeros_like(up)
    for number in range(active.shape[1]):
        pull = (problem.matrix[active[:, number]] * step).abs().clamp_min(1e-30)
        total += torch.exp(-DISTANCE_DECAY * room[:, number, None] / pull) * size[:, number, None]
    return total / size.sum(1, keepdim=True).clamp_min(1e-30)


def _repair(problem: MinMaxProblem, state: MinMaxSolution, removed: Tensor, shifts: Tensor, greedy: Tensor) -> None:
    """One removed variable after the other: by a random level, or by the one that lowers the largest violation."""
    for number in range(removed.shape[1]):
        variable = removed[:, number, None]
        up, down = (step.gather(1, variable)[:, 0] for step in _steps(problem, state.codes))
        column = problem.columns[variable[:, 0]]
        tried = torch.stack(
            [
                torch.where(
                    torch.isfinite(step), (state.violation + sign * step[:, None] * column).abs().amax(1), torch.inf
                )
                for step, sign in ((up, 1), (down, -1))
            ]
        )
        least, which = tried.min(0)
        best = torch.where(least < state.worst, 1 - 2 * which, 0)
        shift = torch.where(greedy, best, shifts[:, number])
        for step, sign in ((up, 1), (down, -1)):
            moves = (shift == sign) & torch.isfinite(step)
            _apply(problem, state, _Moves(variable, step[:, None]), moves, sign)
