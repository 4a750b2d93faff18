import pytest
import torch

from mergequant.runtime import DecoderShape

TINY = DecoderShape(
    layers=2, channels=64, heads=4, kv_heads=2, head_width=32, ffn=96, vocabulary=128, positions=256, rope_theta=1e4
)


@pytest.fixture
def shape() -> DecoderShape:
    """A decoder that runs in milliseconds."""
    return TINY


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
