"""Dimension reconstruction: splitting, staggering, dropping."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergequant.errors import UsageError
from mergequant.grids import IntegerGrid
from mergequant.transforms import ChannelScheme, drop_slots, split_channels, split_counts

strengths = st.lists(
    st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1e6), st.integers(1, 9).map(float)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(values=strengths, budget=st.integers(-1, 60), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_split_counts_when_any_strengths_expect_whole_budget_and_monotone_copies(
    values: list[float], budget: int, dtype: torch.dtype
) -> None:
    strength = torch.tensor(values, dtype=dtype)
    copies = split_counts(strength, budget)
    assert copies.dtype == torch.int64
    assert int(copies.min()) >= 1
    spent = int(copies.sum()) - len(values)
    assert spent == (max(budget, 0) if float(strength.max()) > 0 else 0)
    order = torch.argsort(strength, descending=True)
    for one, other in pairwise(order.tolist()):
        if strength[one] > strength[other]:
            assert copies[one] >= copies[other]


@settings(max_examples=60, deadline=None)
@given(values=strengths, budget=st.integers(0, 8))
def test_split_counts_when_compared_with_greedy_expect_no_larger_strength_per_copy(
    values: list[float], budget: int
) -> None:
    """Giving every extra slot to the strongest channel is optimal for the largest strength per copy."""
    strength = torch.tensor(values, dtype=torch.float64)
    greedy = torch.ones(len(values), dtype=torch.int64)
    for _ in range(budget):
        greedy[torch.argmax(strength / greedy)] += 1
    copies = split_counts(strength, budget)
    assert float((strength / copies).max()) <= float((strength / greedy).max()) * (1 + 1e-6)


def test_split_counts_when_one_channel_is_strong_expect_all_copies_there() -> None:
    assert split_counts(torch.tensor([1.0, 16.0, 1.0, 2.0]), 7).tolist() == [1, 8, 1, 1]


@pytest.mark.parametrize("copies", range(1, 10))
def test_stagger_when_copies_are_summed_expect_one_rounding_of_a_finer_grid(copies: int) -> None:
    """Hermite's identity, before clamping."""
    z = torch.randn(4000, generator=torch.Generator().manual_seed(copies), dtype=torch.float64) * 3
    scheme = split_channels(torch.ones(1, dtype=torch.float64), torch.tensor([copies]), 4, stagger=True)
    total = (z[:, None] + scheme.offset).round().sum(1)
    assert torch.equal(total, (copies * z).round())


@pytest.mark.parametrize("copies", range(1, 7))
def test_stagger_when_copies_are_clamped_expect_the_finer_grid_that_clipping_searches_on(copies: int) -> None:
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(copies), dtype=torch.float64) * 8
    scheme = split_channels(torch.ones(1, dtype=torch.float64), torch.tensor([copies]), 4, stagger=True)
    grid = IntegerGrid(4)
    finer = torch.tensor([float(copies)], dtype=torch.float64)
    total = grid.nearest(z + scheme.offset).sum(1)
    assert torch.equal(total, grid.nearest(copies * z[:, 0], finer))
    assert (float(total.min()), float(total.max())) == (-8 * copies, 7 * copies)


def test_split_channels_when_staggered_expect_more_precise_activations_and_same_function() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    step = x.abs().amax(0) / 7
    errors = []
    for stagger in (False, True):
        scheme = split_channels(step, torch.tensor([4, 4, 4]), 4, stagger=stagger)
        assert scheme.index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        errors.append(float((scheme.values(x) @ scheme.fold(weight).t() - x @ weight.t()).square().sum()))
    assert errors[1] < errors[0] / 10  # two bits more: a sixteenth


def split_scheme() -> ChannelScheme:
    return split_channels(torch.rand(12) + 0.5, torch.tensor([1, 3, 1, 1, 2, 1, 1, 1, 1, 4, 1, 1]), 4, stagger=True)


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_drop_slots_when_split_slots_are_the_weakest_expect_only_unsplit_ones_dropped(count: int) -> None:
    scheme = split_scheme()
    generator = torch.Generator().manual_seed(0)
    energy = torch.rand(12, generator=generator, dtype=torch.float64) + 1  # by channel
    folded = torch.rand(5, scheme.width, generator=generator) + 1
    folded[:, scheme.share < 1] *= 1e-6
    kept = drop_slots(scheme, energy, folded, count)
    assert kept.width == scheme.width - count
    assert torch.bincount(kept.index, minlength=12)[[1, 4, 9]].tolist() == [3, 2, 4]
    importance = energy[scheme.index] * folded.double().square().sum(0)
    unsplit = (scheme.share == 1).nonzero().flatten()
    weakest = unsplit[importance[unsplit].argsort()[:count]]
    assert sorted(set(scheme.index.tolist()) - set(kept.index.tolist())) == sorted(scheme.index[weakest].tolist())


def test_drop_slots_when_more_than_the_unsplit_channels_expect_error() -> None:
    scheme = split_scheme()
    energy, folded = torch.ones(12, dtype=torch.float64), torch.ones(2, scheme.width)
    with pytest.raises(UsageError, match="only 9 channels are not split"):
        drop_slots(scheme, energy, folded, 10)
