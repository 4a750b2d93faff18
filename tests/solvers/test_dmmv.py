"""Discrete min-max violation: against brute force on tiny problems, and against its start on larger ones."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import IntegerGrid, Quantizer
from mergequant.solvers import MinMaxProblem, MinMaxSearch, gptq, min_max_search, rtn
from mergequant.solvers.dmmv import MoveName

LOCAL = MinMaxSearch(iterations=0)


def tiny(variables: int = 6, rows: int = 5, uneven: bool = False, seed: int = 0) -> MinMaxProblem:
    """Six variables of three levels: 729 states."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(15, variables, generator=generator, dtype=torch.float64)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[None, None]
    if uneven:
        levels = torch.rand(rows, variables, 3, generator=generator, dtype=torch.float64).add(0.1).cumsum(-1) - 1
        levels[:, 1, 2] = torch.inf  # a set of two
    wanted = torch.rand(rows, variables, generator=generator, dtype=torch.float64) * 2 - 1
    return MinMaxProblem(matrix, wanted @ matrix.t(), levels)


def brute_force(problem: MinMaxProblem) -> Tensor:
    """Least worst violation of every row over all states."""
    rows, variables = problem.shape
    best = torch.full((rows,), torch.inf, dtype=torch.float64)
    for state in itertools.product(range(problem.levels.shape[-1]), repeat=variables):
        violation = problem.violation(torch.tensor(state).expand(rows, -1)).nan_to_num(nan=torch.inf)
        best = torch.minimum(best, violation.abs().amax(1))
    return best


def layer(rows: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens (1024, 64) with two strong channels, and a weight (rows, 64)."""
    torch.manual_seed(0)
    tokens = torch.randn(1024, 64)
    tokens[:, :2] *= 8
    return tokens @ (torch.eye(64) + 0.3 * torch.randn(64, 64) / 8), torch.randn(rows, 64) / 8


@pytest.mark.parametrize("uneven", [False, True])
def test_search_when_a_problem_is_tiny_expect_the_optimum_of_brute_force(uneven: bool) -> None:
    problem = tiny(uneven=uneven)
    wanted = torch.linalg.lstsq(problem.matrix, problem.target.t()).solution.t()
    start = problem.nearest(wanted)
    search = MinMaxSearch("swap_and_single", guard=False, iterations=60, rate=0.4)
    assert torch.allclose(min_max_search(problem, start, search).worst, brute_force(problem))


@pytest.mark.parametrize("moves", ["swap", "swap_and_single"])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("active", [1, 4, 100])
def test_one_move_when_filtered_expect_the_best_one_of_all(moves: MoveName, guard: bool, active: int) -> None:
    problem = tiny(variables=12, rows=7, seed=3)
    start = torch.randint(0, 3, (7, 12), generator=torch.Generator().manual_seed(1))
    found = min_max_search(problem, start, MinMaxSearch(moves, guard, 0, active=active, rounds=1))
    for row in range(7):
        own = problem.rows(slice(row, row + 1))
        code, before = start[row : row + 1], problem.violation(start)[row]
        tried = [(i, j) for i in range(12) for j in range(12) if i != j and code[0, j] == code[0, i] + 1]
        tried += [(i, -1) for i in range(12)] + [(-1, j) for j in range(12)] if moves != "swap" else []
        best = before.abs().max()
        for rising, falling in tried:
            moved = code.clone()
            if rising >= 0:
                moved[0, rising] += 1
            if falling >= 0:
                moved[0, falling] -= 1
            if moved.min() < 0 or moved.max() > 2:
                continue
            after = own.violation(moved)[0]
            if not guard or after.square().sum() <= before.square().sum():
                best = torch.minimum(best, after.abs().max())
        assert found.worst[row] == pytest.approx(float(best), abs=2e-3)


@pytest.mark.parametrize("search", [LOCAL, MinMaxSearch("swap_and_single", candidates=16, checks=8, iterations=3)])
def test_state_when_moves_were_made_expect_what_is_computed_anew(search: MinMaxSearch) -> None:
    problem = tiny(variables=40, rows=6)
    start = torch.randint(0, 3, (6, 40), generator=torch.Generator().manual_seed(0))
    found = min_max_search(problem, start, search)
    assert int(found.moves.sum()) > 6
    violation = problem.violation(found.codes)
    assert torch.allclose(found.violation, violation)
    assert torch.allclose(found.slope, violation @ problem.matrix)
    energies = [violation.square().sum(1), problem.violation(start).square().sum(1)]
    assert torch.allclose(found.energy, energies[0] - energies[1])
    assert bool((found.energy <= 0).all())
    assert bool((found.worst < problem.violation(start).abs().amax(1)).all())
    assert int(found.codes.min()) >= 0
    assert int(found.codes.max()) <= 2
    again = min_max_search(problem, start, search)
    assert torch.equal(again.codes, found.codes)


def test_search_when_rows_are_searched_alone_expect_the_same_codes() -> None:
    problem = tiny(variables=20, rows=4, uneven=True)
    start = torch.zeros(4, 20, dtype=torch.long)
    together = min_max_search(problem, start, LOCAL).codes
    for row in range(4):
        own = slice(row, row + 1)
        assert torch.equal(min_max_search(problem.rows(own), start[own], LOCAL).codes[0], together[row])


@pytest.mark.parametrize(("moves", "least_gain"), [("swap", 0.04), ("swap_and_single", 0.08)])
def test_search_when_it_starts_from_gptq_expect_a_lower_worst_error_at_no_squared_loss(
    moves: MoveName, least_gain: float
) -> None:
    tokens, weight = layer()
    start = gptq(weight, tokens.t() @ tokens, Quantizer(IntegerGrid(3))).quantized
    levels = (torch.arange(-4, 4).float() * start.scale)[:, None]
    problem = MinMaxProblem(tokens, weight @ tokens.t(), levels)
    before = problem.violation(start.codes.long() + 4)
    found = min_max_search(problem, start.codes.long() + 4, MinMaxSearch(moves, iterations=4, candidates=32, checks=32))
    assert float(found.worst.mean()) < (1 - least_gain) * float(before.abs().amax(1).mean())
    assert bool((found.violation.square().sum(1) <= before.square().sum(1) * (1 + 1e-5)).all())


def test_guard_when_it_is_off_expect_worst_error_bought_with_squared_error() -> None:
    tokens, weight = layer()
    start = gptq(weight, tokens.t() @ tokens, Quantizer(IntegerGrid(3))).quantized
    problem = MinMaxProblem(tokens, weight @ tokens.t(), (torch.arange(-4, 4).float() * start.scale)[:, None])
    codes = start.codes.long() + 4
    guarded, free = (min_max_search(problem, codes, replace(LOCAL, guard=guard)) for guard in (True, False))
    assert float(free.worst.mean()) < float(guarded.worst.mean())
    assert float(free.energy.mean()) > 0 >= float(guarded.energy.max()) - 1e-3


def test_search_when_it_starts_from_nearest_expect_both_errors_to_fall() -> None:
    tokens, weight = layer()
    start = rtn(weight, Quantizer(IntegerGrid(3))).quantized
    problem = MinMaxProblem(tokens, weight @ tokens.t(), (torch.arange(-4, 4).float() * start.scale)[:, None])
    before = problem.violation(start.codes.long() + 4)
    found = min_max_search(problem, start.codes.long() + 4, LOCAL)
    assert float(found.worst.mean()) < 0.8 * float(before.abs().amax(1).mean())
    assert float(found.violation.square().sum()) < 0.8 * float(before.square().sum())


def test_quadratic_when_it_stands_for_more_tokens_expect_the_guard_to_watch_them() -> None:
    tokens, weight = layer()
    start = gptq(weight, tokens.t() @ tokens, Quantizer(IntegerGrid(3))).quantized
    levels, gram = (torch.arange(-4, 4).float() * start.scale)[:, None], tokens.t() @ tokens
    some = tokens[::8]
    problem = MinMaxProblem(some, weight @ some.t(), levels, gram, weight @ gram)
    found = min_max_search(problem, start.codes.long() + 4, LOCAL)
    error = [(q - weight) @ tokens.t() for q in (problem.values(found.codes), start.decode())]
    assert bool((error[0].square().sum(1) <= error[1].square().sum(1) * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(5, 14, dtype=torch.float64)}, "do not belong together"),
        ({"levels": torch.zeros(3, dtype=torch.float64)}, "2, 2 and 3 axes"),
        ({"levels": torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)}, "ascending"),
        ({"levels": torch.full((1, 1, 1), torch.inf)}, "finite"),
        ({"gram": torch.eye(6, dtype=torch.float64)}, "belong together"),
    ],
)
def test_problem_when_its_parts_disagree_expect_a_reason(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(tiny(), **change)  # type: ignore[arg-type]


def test_search_when_the_start_or_a_setting_is_bad_expect_a_reason() -> None:
    problem = tiny(uneven=True)
    with pytest.raises(UsageError, match="the problem has"):
        min_max_search(problem, torch.zeros(5, 5, dtype=torch.long))
    for code in (3, -1):
        with pytest.raises(UsageError, match=r"outside 0\.\.2"):
            min_max_search(problem, torch.full((5, 6), code))
    with pytest.raises(UsageError, match="without a level"):
        min_max_search(problem, torch.full((5, 6), 2))
    for bad in ({"moves": "jump"}, {"iterations": -1}, {"active": 0}):
        with pytest.raises(UsageError, match="moves are swap"):
            MinMaxSearch(**bad)  # type: ignore[arg-type]
    for bad in ({"rate": 0.0}, {"tolerance": 1.0}):
        with pytest.raises(UsageError, match="rate must be"):
            MinMaxSearch(**bad)  # type: ignore[arg-type]
