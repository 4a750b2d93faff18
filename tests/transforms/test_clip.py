"""Clip ratios per channel."""

import pytest
import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.transforms import channel_clip_ratios, even_fractions, split_channels


def heavy_tailed() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 20, generator=generator).pow(3)
    x[:, 7] = 0
    x[:, 8] = torch.randint(-7, 8, (800,), generator=generator)  # on the grid already: clipping can only hurt
    x[0, 8] = 7
    return x


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("bits", [4, 8])
def test_clip_ratios_when_searched_expect_within_bounds_and_never_worse_than_one(
    stagger: bool, norm: float, bits: int
) -> None:
    x, grid = heavy_tailed(), IntegerGrid(bits)
    step = x.abs().amax(0) / grid.high
    copies = torch.ones(20, dtype=torch.int64)
    copies[:6] = torch.tensor([2, 3, 4, 2, 5, 8])
    ratios = channel_clip_ratios(x, step, copies, bits, stagger=stagger, norm=norm, least=0.3, steps=15)
    assert float(ratios.min()) >= 0.3 - 1e-6
    assert float(ratios.max()) <= 1.0
    if bits == 4:
        assert float(ratios[8]) == 1.0
        assert ratios.unique().numel() > 3

    def loss(chosen: Tensor) -> Tensor:
        """Error of every channel after quantizing with all its copies, through the run time's own arithmetic."""
        scheme = split_channels(step * chosen, copies, bits, stagger=stagger)
        one = torch.zeros(800, 20).index_add(1, scheme.index, scheme.values(x) * scheme.share)
        return (one * step * chosen - x).double().abs().pow(norm).sum(0)

    assert bool((loss(ratios) <= loss(torch.ones(20)) * (1 + 1e-4) + 1e-9).all())
    if bits == 4:
        assert float(loss(ratios).sum()) < 0.9 * float(loss(torch.ones(20)).sum())


def test_even_fractions_when_listed_expect_one_first_and_least_last() -> None:
    assert even_fractions(0.5, 6) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert even_fractions(0.5, 1) == [1.0]
