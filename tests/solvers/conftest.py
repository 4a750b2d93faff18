"""Correlated inputs for second-order solvers."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def tokens() -> Tensor:
    """Float64 inputs (400, 32): correlated, with channels of different size."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(400, 32, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, 32).double()
    return x @ turn * torch.logspace(-0.3, 0.3, 32, dtype=torch.float64)


@pytest.fixture
def weight() -> Tensor:
    """Float32 (24, 32)."""
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
