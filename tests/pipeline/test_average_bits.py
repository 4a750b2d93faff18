"""A budget for the average bits of any recipe, from the plan to the file."""

from collections.abc import Callable
from pathlib import Path

import pytest

import mergequant
from families import make_model
from mergequant.checkpoint import count_bits, open_checkpoint
from mergequant.errors import RecipeError
from mergequant.nn import LinearSpec
from mergequant.pipeline import Quantized
from mergequant.recipes import get_recipe
from mergequant.steps import AllocateBits


def stored_bits(folder: Path) -> tuple[float, set[int]]:
    """Bits of codes, scales and zeros for each quantized weight, and the widths that occur."""
    checkpoint = open_checkpoint(folder)
    layers = {name: spec for name, spec in checkpoint.quantization.layers.items() if isinstance(spec, LinearSpec)}
    parts = ("weight_codes", "weight_scale", "weight_zero")
    stored = sum(
        checkpoint.entries[f"{name}.{part}"].size
        for name in layers
        for part in parts
        if f"{name}.{part}" in checkpoint.entries
    )
    weights = sum(spec.outputs * spec.input.width for spec in layers.values())
    return 8 * stored / weights, {spec.weight_bits for spec in layers.values()}


@pytest.mark.parametrize(
    ("recipe", "settings", "average"),
    [
        ("gptq", {}, 4.6),
        ("rtn", {"activation_bits": 8}, 5.3),
        ("quantease", {"group_size": 20, "sweeps": 2}, 6.0),
        ("quarot", {"weight_clip": False}, 6.1),
    ],
)
def test_average_bits_expect_the_file_to_hold_at_most_that_and_nearly_as_much(
    recipe: str, settings: dict[str, object], average: float, tmp_path: Path, run: Callable[..., Quantized]
) -> None:
    run(make_model("llama"), recipe, tmp_path / "out", settings={**settings, "average_bits": average})
    bits, widths = stored_bits(tmp_path / "out")
    assert average - 0.3 < bits <= average
    assert len(widths) > 1
    assert count_bits(tmp_path / "out")["linear_bits_per_parameter"] > bits  # headers and biases count there


def test_average_bits_when_the_budget_cannot_be_met_expect_refusal_while_planning_with_what_can() -> None:
    model = make_model("llama")
    for average in (2.0, 9.5):
        with pytest.raises(RecipeError, match=r"cannot be met: .* give 2\.\d+ to 8\.\d+ bits"):
            mergequant.plan(model, "gptq", samples=4, seqlen=24, settings={"average_bits": average})
    planned = mergequant.plan(model, "gptq", samples=4, seqlen=24, settings={"average_bits": 4})
    assert all("4 bits on average" in site.weights for site in planned.sites)


def test_average_bits_when_the_recipe_has_no_plain_integers_expect_refusal() -> None:
    for name, settings in (("qserve", {}), ("quantease", {"outliers": 0.01})):
        with pytest.raises(RecipeError, match="Choose rtn, gptq"):
            get_recipe(name, **settings).with_settings({"average_bits": 4.0})
    with pytest.raises(RecipeError, match="widths"):
        AllocateBits(widths=(4, 3))
    made = get_recipe("awq").with_settings({"group_size": 32, "average_bits": 3.4})
    assert next(step.name for step in made.steps) == "allocate_bits"
    assert made.with_average_bits(3.0).steps[1:] == made.steps[1:]
    assert type(made).from_dict(made.to_dict(), "again").steps == made.steps


def test_average_bits_expect_the_width_where_it_matters(run: Callable[..., Quantized]) -> None:
    """A linear whose rounding is hardly felt gets few bits: o_proj adds little to the stream in one block."""
    model = make_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data *= 0.01
    quantized = run(model, "rtn", settings={"activation_bits": 16, "average_bits": 5.0})
    layers = open_checkpoint(quantized.folder).quantization.layers
    specs = {name: spec.weight_bits for name, spec in layers.items() if isinstance(spec, LinearSpec)}
    assert specs["model.layers.1.self_attn.o_proj"] == 2
    assert specs["model.layers.0.self_attn.o_proj"] > 4
