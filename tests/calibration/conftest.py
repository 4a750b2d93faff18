"""The bundled model, opened block by block, and windows of random tokens."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant.assets import TINY
from mergequant.models import ModelShell

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def shell() -> ModelShell:
    return ModelShell.open(TINY)


@pytest.fixture
def tokens() -> Tensor:
    """(5, 20), each window beginning with BOS."""
    drawn = torch.randint(3, 8192, (5, 20), generator=torch.Generator().manual_seed(0))
    drawn[:, 0] = 1
    return drawn
