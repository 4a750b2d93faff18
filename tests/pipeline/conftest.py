"""Ready windows, and a run of the pipeline that takes a moment."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mergequant
from mergequant.pipeline import Quantized

sys.path.insert(0, str(Path(__file__).parents[1]))

SAMPLES, HELD_OUT, SEQLEN = 4, 2, 24


def windows_for(model: PreTrainedModel, count: int = SAMPLES + HELD_OUT, seqlen: int = SEQLEN, seed: int = 7) -> Tensor:
    """Random windows (count, seqlen) that begin with the model's BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.config.vocab_size, (count, seqlen), generator=generator)
    tokens[:, 0] = model.config.bos_token_id
    return tokens


@pytest.fixture
def windows() -> Callable[..., Tensor]:
    """`windows_for`."""
    return windows_for


@pytest.fixture
def run() -> Callable[..., Quantized]:
    """`quantize` on a few ready windows."""

    def quantize(model: PreTrainedModel, recipe: Any, out: Path | None = None, **options: Any) -> Quantized:
        if "data" not in options:
            options["data"] = windows_for(model)
        options = {"samples": SAMPLES, "seqlen": SEQLEN, **options}
        return mergequant.quantize(model, recipe, out=out, **options)

    return quantize
