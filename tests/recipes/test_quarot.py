"""QuaRot's steps and settings."""

import pytest

from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import Rotate, RotateResidual, Round, TokenInput


def test_quarot_when_plain_expect_the_papers_defaults() -> None:
    chosen = get_recipe("quarot")
    assert [type(step) for step in chosen.steps] == [RotateResidual, Rotate, TokenInput, Round]
    assert chosen.steps[0] == RotateResidual(heads=True)
    assert chosen.steps[1] == Rotate(("mlp_output",))
    token = chosen.steps[2]
    assert isinstance(token, TokenInput)
    assert (token.bits, token.search, token.clip_ratio) == (4, False, 0.9)
    assert chosen.prefix == "none"
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_quarot_when_settings_change_expect_the_steps_to_follow() -> None:
    chosen = get_recipe("quarot", heads="online", activation_clip="search", prefix="bos")
    assert chosen.steps[0] == RotateResidual(heads=False)
    assert chosen.steps[1] == Rotate(("attention_output", "mlp_output"))
    assert chosen.prefix == "bos"
    weight_only = get_recipe("quarot", activation_bits=16, rounding="rtn")
    assert not any(isinstance(step, TokenInput) for step in weight_only.steps)


def test_quarot_when_clip_ratio_is_no_share_expect_error() -> None:
    with pytest.raises(RecipeError, match="clip_ratio"):
        get_recipe("quarot", clip_ratio=0.0)


def test_recipe_when_a_step_of_the_whole_model_comes_late_expect_error() -> None:
    with pytest.raises(RecipeError, match="'rotate_residual' changes the whole model"):
        Recipe("own", "", (Round(), RotateResidual()))
