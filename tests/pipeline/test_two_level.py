"""Checkpoints with two-level weights (QServe): planned, near the float model, served where nothing can be rotated."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mergequant
from families import make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import StructureError
from mergequant.nn import LinearSpec
from mergequant.pipeline import Quantized, plan


def test_plan_of_qserve_says_what_weights_become_and_refuses_what_cannot_be_rotated() -> None:
    settings = {"group_size": 8}
    sites = plan(make_model("llama"), "qserve", settings=settings).sites
    assert {site.weights for site in sites} == {f"int4 groups of {size} in int8 per row, gptq" for size in (4, 8)}
    with pytest.raises(StructureError, match="gptq"):
        plan(make_model("opt"), "qserve")
    assert plan(make_model("opt"), "qserve", settings={"rotate": False}).sites


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_qserve_expect_near_the_float_model_and_nearer_than_rows_at_8_bits(
    family: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model(family)
    tokens = windows(model, 3, 21, seed=2)

    def error(recipe: str, **settings: object) -> float:
        made = run(model, recipe, settings=settings)
        with torch.no_grad():
            exact, given = model(tokens).logits, mergequant.load(made.folder)(tokens).logits
        return float((given - exact).norm() / exact.norm())

    groups = error("qserve", group_size=8)
    assert groups < error("gptq", activation_bits=8)
    assert groups < 0.2


@pytest.mark.parametrize("family", ["opt", "opt_gelu_projected", "gemma2"])
def test_qserve_when_not_rotated_expect_other_families_to_be_served(
    family: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model(family)
    made = run(model, "qserve", settings={"rotate": False, "group_size": 8})
    layers = open_checkpoint(made.folder).quantization.layers.values()
    assert all(spec.levels == 2 for spec in layers if isinstance(spec, LinearSpec))
    with torch.no_grad():
        assert mergequant.load(made.folder)(windows(model)).logits.isfinite().all()
