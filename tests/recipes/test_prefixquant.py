"""PrefixQuant's steps and settings."""

import pytest

from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import Rotate, RotateResidual, Round, TensorInput, TuneBlock


def test_prefixquant_when_plain_expect_static_inputs_everywhere_and_a_searched_prefix() -> None:
    chosen = get_recipe("prefixquant")
    assert [type(step) for step in chosen.steps] == [RotateResidual, Rotate, TensorInput, Round]
    assert chosen.steps[0] == RotateResidual(heads=True)
    assert chosen.steps[1] == Rotate(("mlp_output",))
    assert chosen.steps[2] == TensorInput(bits=4)
    assert chosen.prefix == "auto"
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_prefixquant_when_settings_change_expect_the_steps_to_follow() -> None:
    chosen = get_recipe("prefixquant", heads="online", grid=1, rounding="rtn", prefix=(1, 13))
    assert chosen.steps[0] == RotateResidual(heads=False)
    assert chosen.steps[1] == Rotate(("attention_output", "mlp_output"))
    assert chosen.steps[2] == TensorInput(bits=4, steps=1)
    assert chosen.prefix == (1, 13)


def test_prefixquant_when_fine_tuned_expect_rounding_within_the_trained_ranges() -> None:
    chosen = get_recipe("prefixquant", fine_tune=3, weight_bits=4)
    assert chosen.steps[-2] == TuneBlock(4, epochs=3)
    assert chosen.steps[-1] == Round(method="rtn", bits=4, clip=False)
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_prefixquant_when_nothing_is_tried_expect_error() -> None:
    with pytest.raises(RecipeError, match="grid"):
        get_recipe("prefixquant", grid=0)
    with pytest.raises(RecipeError, match="epochs"):
        get_recipe("prefixquant", fine_tune=-1)
