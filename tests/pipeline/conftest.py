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
from mergequant import errors
from mergequant.pipeline import Quantized

sys.path.insert(0, str(Path(__file__).parents[1]))

SAMPLES, HELD_OUT, SEQLEN = 4, 2, 24


def windows_for(model: PreTrainedModel, count: int = SAMPLES + HELD_OUT, seqlen: int = SEQLEN, seed: int = 7) -> Tensor:
    """Random windows (count, seqlen) that begin with the model's BOS, if it has one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.config.vocab_size, (count, seqlen), generator=generator)
    if model.config.bos_token_id is not None:
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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a sharded float model."""
    from families import save_model  # importable only after the line above

    return save_model("llama", tmp_path / "model", max_shard_size="30KB")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out"


@pytest.fixture
def refused(out: Path, run: Callable[..., Quantized]) -> Callable[..., str]:
    """Run, expect an error, look at what is left, return the message."""
    tokens = torch.randint(3, 97, (SAMPLES + HELD_OUT, SEQLEN), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = 1

    def check(kind: type[errors.MergeQuantError], model: Any, recipe: Any = "mergequant", **options: Any) -> str:
        out.parent.mkdir(exist_ok=True)
        with pytest.raises(kind) as caught:
            run(model, recipe, out, **{"data": tokens, **options})
        assert type(caught.value) is kind
        assert not (out / "config.json").exists()
        assert not list(out.parent.glob("*.partial/config.json"))
        return str(caught.value)

    return check
