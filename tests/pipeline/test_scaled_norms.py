"""A norm that was scaled stays a float norm of the stored dtype, and the model loses nothing by it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergequant
from families import make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.pipeline import Quantized


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_smoothquant_when_model_is_bfloat16_expect_its_norms_in_bfloat16(
    family: str, tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model(family, dtype=torch.bfloat16)
    run(model, "smoothquant", tmp_path / "out")
    name = "model.layers.0.input_layernorm.weight"
    stored = open_checkpoint(tmp_path / "out").get(name)
    assert stored.dtype == torch.bfloat16
    assert not torch.equal(stored, model.state_dict()[name])
    wide = mergequant.load(tmp_path / "out", dtype=torch.float32)
    tokens = windows(model, 3, 17)
    with torch.no_grad():
        exact, found = model.float()(tokens).logits, wide(tokens).logits
    assert float((found - exact).norm() / exact.norm()) < 0.05  # W8A8; a norm that had lost its scale would show


def test_plan_when_recipe_scales_channels_expect_steps_named() -> None:
    planned = mergequant.plan(make_model("opt"), "smoothquant", samples=4, seqlen=24)
    steps = {site.kind: site.steps for site in planned.sites}
    assert steps["norm"] == ("scale_channels", "token_input", "round")
    assert steps["mlp_output"] == ("token_input", "round")


def test_outlier_suppression_plus_when_model_is_bfloat16_expect_norms_in_bfloat16_and_biases_that_fit(
    tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model("opt", dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn_layer_norm.bias[[2, 9]] += torch.tensor([37.0, -23.0])
    run(model, "outlier-suppression-plus", tmp_path / "out", settings={"thresholds": 3, "weight_bits": 8})
    name = "model.decoder.layers.0.self_attn_layer_norm.bias"
    stored = open_checkpoint(tmp_path / "out").get(name)
    assert stored.dtype == torch.bfloat16
    assert float(stored.abs().max()) < 10 < float(model.state_dict()[name].abs().max())
    wide = mergequant.load(tmp_path / "out", dtype=torch.float32)
    tokens = windows(model, 3, 17)
    with torch.no_grad():
        exact, found = model.float()(tokens).logits, wide(tokens).logits
    assert float((found - exact).norm() / exact.norm()) < 0.1
