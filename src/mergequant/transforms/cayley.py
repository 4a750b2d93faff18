"""Gradient steps on the orthogonal group.

"Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform", arXiv 2002.01113, algorithm 1
without momentum: what SpinQuant learns its rotations with.
"""

import torch
from torch import Tensor

__all__ = ["cayley_step", "nearest_orthogonal"]

ITERATIONS = 5


def cayley_step(matrix: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The orthogonal matrix after a step against the gradient.

    Args:
        matrix: orthogonal (n, n).
        gradient: of the loss with respect to it (n, n).
        rate: step size; it is cut to 1 / ||W||_1 with W the skew direction, where the iteration would not contract.

    Returns:
        (n, n), orthogonal up to the error of `ITERATIONS` fixed-point iterations.
    """
    half = gradient @ matrix.t() - 0.5 * matrix @ (matrix.t() @ gradient @ matrix.t())
    skew = half - half.t()
    step = min(rate, 1.0 / max(float(torch.linalg.matrix_norm(skew, 1)), 1e-30))
    moved = matrix - step * skew @ matrix
    for _ in range(ITERATIONS):
        moved = matrix - step / 2 * skew @ (matrix + moved)
    return moved


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to one that has drifted (n, n), found in float64; in the dtype of `matrix`."""
    left, _, right = torch.linalg.svd(matrix.double())
    return (left @ right).to(matrix.dtype)
