"""Bits under a budget."""

import itertools

import pytest
import torch

from mergequant.errors import UsageError
from mergequant.solvers import allocate


def total(table: list[list[float]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(own[form] for own, form in zip(table, chosen))


def test_allocate_when_costs_are_convex_expect_the_optimum_of_exhaustive_search() -> None:
    """Equal parts and costs that fall fourfold with each bit: the greedy choice is the best there is."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = [[float(scale) * 4.0**-bits for bits in range(4)] for scale in torch.rand(5, generator=generator) ** 3]
        sizes = [[100.0 * (bits + 2) for bits in range(4)] for _ in range(5)]
        for budget in (1000.0, 1300.0, 1750.0, 2500.0):
            chosen = allocate(costs, sizes, budget)
            assert total(sizes, chosen) <= budget
            fitting = [way for way in itertools.product(range(4), repeat=5) if total(sizes, way) <= budget]
            assert total(costs, chosen) <= min(total(costs, way) for way in fitting) * (1 + 1e-12)


def test_allocate_when_parts_are_uneven_expect_close_to_the_optimum_and_never_above_equal_widths() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        weights = torch.randint(1, 9, (5,), generator=generator).tolist()
        steps = torch.rand(5, 4, generator=generator) ** 2
        costs = [row.flip(0).cumsum(0).flip(0).tolist() for row in steps]
        sizes = [[float(weight * (bits + 2)) for bits in range(4)] for weight in weights]
        budget = 3.4 * sum(weights)
        chosen = allocate(costs, sizes, budget)
        fitting = [way for way in itertools.product(range(4), repeat=5) if total(sizes, way) <= budget]
        best = min(total(costs, way) for way in fitting)
        assert total(sizes, chosen) <= budget
        assert best - 1e-9 <= total(costs, chosen) <= 1.35 * best


def test_allocate_when_a_step_saves_nothing_expect_it_to_be_skipped() -> None:
    assert allocate([[1.0, 1.0, 0.0], [1.0, 0.5, 0.4]], [[2.0, 3.0, 4.0]] * 2, 6.0) == [2, 0]
    assert allocate([[1.0, 2.0]], [[1.0, 2.0]], 9.0) == [0]
    with pytest.raises(UsageError, match="smallest forms take 4"):
        allocate([[1.0], [1.0]], [[2.0], [2.0]], 3.0)
