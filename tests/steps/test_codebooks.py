"""Rounding to codebooks at work on a block."""

import logging
from collections.abc import Callable

import pytest
import torch

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.nn import CodebookLinear
from mergequant.recipes import get_recipe
from mergequant.steps import RoundChannels, RoundVectors, TokenInput
from mergequant.steps.rounding import held_out_error

Opener = Callable[..., BlockContext]
SMALL = {"vector": 2, "bits": 4, "iterations": 10}


def opened(open_block: Opener, number: int = 0) -> SiteContext:
    context = open_block()
    own = context.site(context.structure.sites[number])
    own.open()
    return own


@pytest.mark.parametrize("step", [RoundVectors(**SMALL), RoundChannels(average_bits=2.5, iterations=10)])  # type: ignore[arg-type]
def test_step_when_run_expect_layers_that_decode_what_was_solved(
    open_block: Opener, step: RoundVectors | RoundChannels
) -> None:
    for number in range(4):
        own = opened(open_block, number)
        step.run(own)
        for name in own.site.consumers:
            module = own.block.module.get_submodule(name)
            assert isinstance(module, CodebookLinear)
            assert torch.equal(module.decoded_weight(), own.solutions[name].quantized.decode())
        figures = own.block.figures[own.site.name]
        assert 2 < figures["stored_bits"] < 40
        assert 0 < figures["output_error"] == held_out_error(own) < 0.5


def test_vectors_when_tuned_expect_less_error_on_the_calibration_tokens(open_block: Opener) -> None:
    errors = []
    for tune in ("none", "least_squares"):
        own = opened(open_block)
        weights, gram = dict(own.weights), own.gram().total
        RoundVectors(**SMALL, tune=tune, tune_steps=10).run(own)  # type: ignore[arg-type]
        left = [own.solutions[name].quantized.decode().double() - weight for name, weight in weights.items()]
        errors.append(sum(float(((one @ gram) * one).sum()) for one in left))
    assert errors[1] < 0.99 * errors[0]


def test_sections_when_outliers_and_groups_expect_the_rest_to_divide() -> None:
    step = RoundVectors(outlier_share=0.01, groups=4, vector=12, residual_bits=12)
    first, rest = step.sections(4098)
    assert (first.columns, first.vector, first.bits, first.groups) == (42, 4, 12, 1)
    assert (rest.columns, rest.vector, rest.bits, rest.residual_bits, rest.groups) == (4056, 12, 12, 12, 4)
    assert [section.columns for section in RoundVectors().sections(40)] == [40]


def test_step_when_codebooks_outweigh_the_layer_expect_a_warning_with_the_true_bits(
    open_block: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    own = opened(open_block)
    with caplog.at_level(logging.WARNING, "mergequant"):
        RoundVectors(vector=4, bits=7, iterations=2).run(own)
    name = own.site.consumers[0]
    true = own.solutions[name].quantized.bits_per_element()  # type: ignore[union-attr]
    assert f"{own.block.name}.{name}" in caplog.text
    assert f"{true:.2f} bits a weight" in caplog.text
    assert true > 5


def test_step_when_it_cannot_serve_expect_error_that_says_what_to_do(open_block: Opener) -> None:
    own = opened(open_block)
    with pytest.raises(RecipeError, match=r"q_proj.*serves only 280 vectors of 6.*at most 8 bits"):
        RoundVectors().run(own)
    TokenInput(bits=8, search=False).run(own)
    with pytest.raises(RecipeError, match="leave out the steps that quantize inputs"):
        RoundVectors(**SMALL).run(own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("cmpq", {"average_bits": 1.5}, "cannot be met with widths of 2 to 4"),
        ("cmpq", {"average_bits": 4.2}, "cannot be met"),
        ("cmpq", {"swap": 0.6}, "swap"),
        ("vptq", {"bits": 17}, "1 to 16 bits"),
        ("vptq", {"bits": 0}, "1 to 16 bits"),
        ("vptq", {"vector": 0}, "must be positive"),
        ("vptq", {"outlier_share": 1.0}, "outlier_share"),
        ("vptq", {"tune": "sgd"}, "tune"),
    ],
)
def test_recipe_when_a_parameter_makes_no_sense_expect_error(recipe: str, settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(RecipeError, match=message):
        get_recipe(recipe, **settings)


def test_plan_when_asked_expect_scheme_in_words() -> None:
    assert get_recipe("vptq").steps[0].scheme == "codebooks, 12 bits for 6 outputs"  # type: ignore[attr-defined]
    assert get_recipe("vptq", residual_bits=8, vector=8).steps[0].bits_per_weight == 2.5  # type: ignore[attr-defined]
    assert "2.2 bits on average" in get_recipe("cmpq", average_bits=2.2).steps[0].scheme  # type: ignore[attr-defined]
