"""Correlated inputs for second-order solvers."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def tokens() -> Tensor:
    """Float64 inputs (400, 32): correlated, with channels of different size."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator, dtype=torch.float64) / 32**0.5
    mix += 0.5 * torch.ones(32, 32, dtype=torch.float64) / 32**0.5
    x = torch.randn(400, 32, generator=generator, dtype=torch.float64) @ mix
    return x * torch.logspace(-0.5, 0.7, 32, dtype=torch.float64)


@pytest.fixture
def weight() -> Tensor:
    """Float32 (24, 32)."""
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
