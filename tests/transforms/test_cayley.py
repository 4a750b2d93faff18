"""Steps on the orthogonal group."""

import pytest
import torch

from mergequant.transforms import cayley_step, nearest_orthogonal


def distance(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.t() - torch.eye(matrix.shape[0], dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.5, 100.0])
def test_cayley_step_expect_an_orthogonal_matrix_near_by(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    gradient = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    moved = cayley_step(start, gradient, rate)
    assert float((moved - start).norm()) > 0
    assert distance(moved) < 0.02  # five iterations of the implicit equation
    assert distance(nearest_orthogonal(moved)) < 1e-12


def test_cayley_step_expect_descent_to_the_nearest_rotation() -> None:
    generator = torch.Generator().manual_seed(1)
    turn = torch.randn(8, 8, generator=generator)
    goal = torch.linalg.matrix_exp(0.2 * (turn - turn.t()))
    found = torch.eye(8)
    losses = []
    for _ in range(60):
        losses.append(float((found - goal).square().sum()))
        found = nearest_orthogonal(cayley_step(found, 2 * (found - goal), 0.2))
    assert losses[-1] < 1e-3 * losses[0]


def test_cayley_step_when_the_gradient_is_zero_expect_the_matrix_itself() -> None:
    assert torch.equal(cayley_step(torch.eye(4), torch.zeros(4, 4), 1.5), torch.eye(4))
