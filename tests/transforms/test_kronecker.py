"""Kronecker transforms: weights take up the inverse exactly."""

import pytest
import torch

from mergequant.transforms import Kronecker, factor_sizes


@pytest.mark.parametrize(
    ("width", "sizes"), [(1, (1, 1)), (13, (1, 13)), (40, (5, 8)), (512, (16, 32)), (1408, (32, 44)), (4096, (64, 64))]
)
def test_factor_sizes_expect_the_most_even_split(width: int, sizes: tuple[int, int]) -> None:
    assert factor_sizes(width) == sizes


@pytest.mark.parametrize("alone", [False, True])
def test_fold_when_weights_are_float64_expect_the_same_output(alone: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, dtype=torch.float64, generator=generator) for size in (5, 8))
    transform = Kronecker(left, None if alone else right)
    x, weight = (torch.randn(rows, 40, dtype=torch.float64, generator=generator) for rows in (7, 11))
    expected = x @ weight.t()
    found = transform.apply(x) @ transform.fold(weight).t()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    assert not torch.allclose(transform.apply(x), x)


def test_condition_expect_that_of_the_whole_product() -> None:
    left, right = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([0.5, 1.0, 1.5]))
    assert Kronecker(left, right).condition == pytest.approx(12.0)
    assert Kronecker(left).condition == pytest.approx(4.0)
