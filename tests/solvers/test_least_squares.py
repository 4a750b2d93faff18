"""Closed-form compensation."""

import pytest
import torch
from torch import Tensor

from mergequant.solvers import least_squares_weight


def clipped(tokens: Tensor) -> Tensor:
    """What quantizing does to inputs: rounded, clamped hard, two channels dropped."""
    return (tokens * 2).round().clamp(-3, 3)[:, 2:]


def relative_error(values: Tensor, weight: Tensor, target: Tensor) -> float:
    return float((values @ weight.double().t() - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_least_squares_when_solved_expect_the_normal_equations_of_stacked_rows(
    tokens: Tensor, weight: Tensor, ridge: float
) -> None:
    values, folded = clipped(tokens), weight[:, 2:] / 2
    gram, cross = values.t() @ values, values.t() @ tokens
    solved = least_squares_weight(folded, weight, gram, cross, ridge)
    # The same minimum by another road: ridge rows under the data, solved by orthogonal factorization.
    pull = (ridge * gram.diagonal().mean()) ** 0.5
    left = torch.cat([values, pull * torch.eye(30, dtype=torch.float64)])
    right = torch.cat([tokens @ weight.double().t(), pull * folded.double().t()])
    expected = torch.linalg.lstsq(left, right).solution.t()
    assert solved.shape == (24, 30)
    assert solved.dtype == torch.float32
    torch.testing.assert_close(solved.double(), expected, rtol=1e-5, atol=1e-6)


def test_least_squares_when_inputs_are_clipped_and_dropped_expect_less_error_on_its_own_tokens(
    tokens: Tensor, weight: Tensor
) -> None:
    values, folded = clipped(tokens), weight[:, 2:] / 2
    target = tokens @ weight.double().t()
    gram, cross = values.t() @ values, values.t() @ tokens
    before = relative_error(values, folded, target)
    errors = [
        relative_error(values, least_squares_weight(folded, weight, gram, cross, ridge), target)
        for ridge in (1e-6, 0.01, 0.1, 1.0, 100.0)
    ]
    assert errors == sorted(errors)  # the weaker the pull, the better on these tokens
    assert errors[0] < 0.8 * before
    assert errors[-1] <= before


def test_least_squares_when_nothing_was_changed_expect_the_folded_weight(tokens: Tensor, weight: Tensor) -> None:
    gram = tokens.t() @ tokens
    torch.testing.assert_close(least_squares_weight(weight, weight, gram, gram, 0.1), weight, rtol=1e-5, atol=1e-6)


def test_least_squares_when_ridge_is_huge_expect_the_folded_weight(tokens: Tensor, weight: Tensor) -> None:
    values, folded = clipped(tokens), weight[:, 2:] / 2
    solved = least_squares_weight(folded, weight, values.t() @ values, values.t() @ tokens, 1e9)
    torch.testing.assert_close(solved, folded, rtol=1e-5, atol=1e-6)


def test_least_squares_when_channels_are_dead_or_copied_expect_finite_weights(tokens: Tensor, weight: Tensor) -> None:
    tokens[:, 4] = 0
    values = torch.cat([tokens, tokens[:, :2]], 1)
    folded = torch.cat([weight, torch.zeros(24, 2)], 1)
    solved = least_squares_weight(folded, weight, values.t() @ values, values.t() @ tokens, 0.1)
    assert bool(torch.isfinite(solved).all())
    torch.testing.assert_close(solved[:, 4], weight[:, 4])
