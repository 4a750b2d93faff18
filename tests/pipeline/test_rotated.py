"""Runs whose recipe changes the whole model: near the float model, honest about size, refused while planning."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergequant
from default_recipes import REFUSED
from families import FAMILIES, make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import StructureError
from mergequant.pipeline import Quantized, plan

EIGHT = {"weight_bits": 8, "activation_bits": 8, "clip_ratio": 1.0}
LARGEST = 0.045  # as in test_closeness
SERVED = [family for family in FAMILIES if family not in REFUSED["quarot"]]


@pytest.mark.parametrize("prefix", ["none", "bos"])
@pytest.mark.parametrize("family", SERVED)
def test_eight_bits_on_family_stay_near_the_float_model(
    family: str, prefix: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model(family)
    tokens = windows(model)
    made = run(model, "quarot", settings={**EIGHT, "prefix": prefix})
    with torch.no_grad():
        exact, found = model(tokens).logits[:, 1:], mergequant.load(made.folder)(tokens).logits[:, 1:]
    assert float((found - exact).norm() / exact.norm()) < LARGEST


def test_quantize_when_head_was_tied_stores_it_and_counts_the_float_models_parameters(
    tmp_path: Path, run: Callable[..., Quantized]
) -> None:
    model = make_model("qwen2", dtype=torch.bfloat16)
    made = run(model, "quarot", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {checkpoint.get(f"{name}.weight").dtype for name in ("lm_head", "model.embed_tokens")} == {torch.bfloat16}
    assert made.figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("family", REFUSED["quarot"])
def test_plan_when_model_cannot_be_rotated_refuses_and_names_a_recipe_that_works(family: str) -> None:
    model = make_model(family)
    with pytest.raises(StructureError, match="mergequant-plus"):
        plan(model, "quarot")
    assert plan(model, "mergequant-plus").sites


def test_quantize_when_seed_differs_rotates_differently(tmp_path: Path, run: Callable[..., Quantized]) -> None:
    model = make_model("llama")
    embeddings = []
    for seed in (0, 1):
        run(model, "quarot", tmp_path / str(seed), seed=seed)
        embeddings.append(open_checkpoint(tmp_path / str(seed)).get("model.embed_tokens.weight"))
    assert not torch.equal(*embeddings)
