"""Made-up rows of `benchmarks/accuracy.py`, and its neighbours as modules."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TEXTS = ("wikitext2_test", "wiki2018")


def load(name: str) -> ModuleType:
    """A script of `benchmarks`, which finds its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


def rows(label: str, recipe: str, model: str, values: list[float], **more: Any) -> list[dict[str, Any]]:
    """A row per seed, with D of both texts."""
    return [
        {
            "label": label, "recipe": recipe, "model": model, "seed": seed, "seconds": 30.0, "activation_bits": 4.0,
            "linear_bits_per_parameter": 4.1,
            "eval": {
                text: {"d": d, "float_perplexity": 30.0, "kl_mean": d, "top1_agreement": 0.9} for text in TEXTS
            },
            **more,
        }
        for seed, d in enumerate(values)
    ]  # fmt: skip
