"""Gram sums: the statistics that second-order solvers and least squares need.

A Hessian is kept as the raw sum of x x^T with the number of tokens; each solver normalises and damps as it needs, so
that nobody can average twice (GPTQ digest, pitfalls).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GramSum"]


@dataclass
class GramSum:
    """Raw sum over tokens of left^T right.

    Attributes:
        total: float64 (left width, right width).
        tokens: number of tokens summed.
    """

    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, left: int, right: int, device: torch.device) -> "GramSum":
        """An empty sum."""
        return cls(torch.zeros(left, right, dtype=torch.float64, device=device))

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Add tokens: left (tokens, left width), right (tokens, right width) or the same again.

        Products run in float32 per call (exact for 4-bit codes and up to 2^18 tokens) and are summed in float64.
        """
        right = left if right is None else right
        self.total += left.t().to(torch.float32) @ right.to(torch.float32)
        self.tokens += left.shape[0]
