"""Checkpoints with outliers (SpQR, GWQ): shares, refusals, and runs that go on with what was measured."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergequant
from families import make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import RecipeError, StructureError
from mergequant.nn import SparseSpec
from mergequant.pipeline import Quantized, plan
from mergequant.pipeline.run import Silent


def sparse_layers(folder: Path) -> list[SparseSpec]:
    return [spec for spec in open_checkpoint(folder).quantization.layers.values() if isinstance(spec, SparseSpec)]


def test_gwq_when_a_model_has_no_gradients_expect_refusal_while_planning_and_another_choice_to_work() -> None:
    with pytest.raises(StructureError, match="no gradients; choose outliers=magnitude"):
        plan(make_model("bert"), "gwq")
    assert plan(make_model("bert"), "gwq", settings={"outliers": "magnitude"}).sites


def test_gwq_expect_one_percent_of_every_matrix_and_less_error_than_random_or_no_outliers(
    run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    model = make_model("llama")
    tokens = windows(model, 3, 21, seed=2)

    def error(**settings: object) -> float:
        made = run(model, "gwq", settings={"group_size": 0, "share": 0.05, **settings})
        for spec in sparse_layers(made.folder):
            expected = round(0.05 * spec.outputs * spec.input.width)
            assert spec.outliers == (0 if settings.get("outliers") == "none" else expected)
        with torch.no_grad():
            exact, given = model(tokens).logits, mergequant.load(made.folder)(tokens).logits
        return float((given - exact).norm() / exact.norm())

    best = error(samples=4)
    assert best < error(outliers="random")
    assert best < error(outliers="none")


def test_round_sparse_when_nothing_was_measured_expect_error_that_names_the_step(run: Callable[..., Quantized]) -> None:
    with pytest.raises(RecipeError, match="needs a step weight_gradients"):
        run(make_model("llama"), "spqr", settings={"outliers": "gradient"})


def test_spqr_expect_the_share_that_was_asked_for_and_figures_of_every_site(run: Callable[..., Quantized]) -> None:
    made = run(make_model("qwen3"), "spqr", settings={"damping": 0.01})
    layers = sparse_layers(made.folder)
    assert {spec.tile for spec in layers} == {16}
    assert all(spec.outliers <= 0.01 * spec.outputs * spec.input.width for spec in layers)
    figures = [site for block in made.figures["sites"].values() for site in block.values()]
    sites = [site for site in figures if "outlier_share" in site]
    assert len(sites) == 8
    assert all(0 <= site["outlier_share"] <= 0.01 and 3 < site["stored_bits"] < 12 for site in sites)


class Stops(Silent):
    """Interrupts a run after its first block."""

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        raise KeyboardInterrupt


def test_gwq_when_interrupted_expect_the_same_bytes_as_without(tmp_path: Path, run: Callable[..., Quantized]) -> None:
    model = make_model("llama")
    whole = run(model, "gwq", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(model, "gwq", tmp_path / "stopped", reporter=Stops())
    again = run(model, "gwq", tmp_path / "stopped")
    assert (whole.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()
