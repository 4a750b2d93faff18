"""Affine transforms that are a Kronecker product of two small matrices: cheap at run time, folded exactly offline.

"FlatQuant: Flatness Matters for LLM Quantization", arXiv 2410.09426, section 3.1: x P with P = left (x) right is two
small matrix products on x reshaped to (left, right); the weights take up the inverse.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant import ops

__all__ = ["Kronecker", "factor_sizes"]


def factor_sizes(width: int) -> tuple[int, int]:
    """(left, right) with left * right = width, left <= right and both as equal as the width allows."""
    left = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return left, width // left


@dataclass(frozen=True)
class Kronecker:
    """x -> x (left (x) right), and what that makes of weights.

    Attributes:
        left: (a, a), invertible.
        right: (b, b), invertible; None = the identity of whatever size is left of the width.
    """

    left: Tensor
    right: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """x (..., width) in the new basis, as the run time computes it: float32 (float64 for float64)."""
        return ops.kronecker_transform(x, self.left, self.right)

    def fold(self, weight: Tensor) -> Tensor:
        """W P^-T (outputs, width), computed in float64, in the weight's dtype: x P (W P^-T)^T = x W^T."""
        left = torch.linalg.inv(self.left.double()).t()
        right = None if self.right is None else torch.linalg.inv(self.right.double()).t()
        return ops.kronecker_transform(weight.double(), left, right).to(weight.dtype)

    @property
    def condition(self) -> float:
        """Condition number of the product."""
        factors = [self.left] if self.right is None else [self.left, self.right]
        return math.prod(float(torch.linalg.cond(factor.double())) for factor in factors)
