"""A comparison on a random model of a few thousand parameters: two recipes, two seeds, windows of 32 tokens."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mergequant
from mergequant.assets import TINY
from mergequant.comparison import Comparison

WORDS = ["river", "stone", "light", "carries", "under", "seven", "old", "birds", "and", "the", "often", "finds", "."]
Compare = Callable[..., Comparison]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("models") / "random"
    LlamaForCausalLM(config).eval().save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One text to calibrate with, two to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{name}.txt" for name in ("calibration", "first", "second")]
    for seed, path in enumerate(paths):
        chooser = random.Random(seed)
        path.write_text(" ".join(chooser.choice(WORDS) for _ in range(3000)), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def options(texts: list[Path]) -> dict[str, Any]:
    """Arguments of `compare` for a run of a second or two."""
    calibration, first, second = texts
    return {
        "data": calibration,
        "evaluation": {"first": first, "second": second},
        "seeds": 2,
        "samples": 2,
        "seqlen": 32,
        "windows": 2,
    }


@pytest.fixture(scope="session")
def finished(model: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A finished comparison, not to be changed."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    return mergequant.compare(model, "rtn,gptq:activation_bits=4", out=out, **options)


@pytest.fixture
def run(model: Path, options: dict[str, Any]) -> Compare:
    """`compare` on the random model."""

    def compare(recipes: Any = "rtn,gptq:activation_bits=4", out: Path | None = None, **more: Any) -> Comparison:
        return mergequant.compare(model, recipes, out=out, **{**options, **more})

    return compare
