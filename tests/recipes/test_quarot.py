"""QuaRot's steps and settings."""

import pytest

from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import MixHeads, Rotate, RotateKeys, RotateResidual, Round, TokenInput


def test_quarot_when_plain_expect_the_papers_defaults() -> None:
    chosen = get_recipe("quarot")
    assert [type(step) for step in chosen.steps] == [RotateResidual, MixHeads, Rotate, TokenInput, Round]
    assert chosen.steps[0] == RotateResidual(heads=True)
    assert chosen.steps[1].to_dict()["sites"] == ["attention_output"]
    assert chosen.steps[2] == Rotate(("mlp_output",))
    assert chosen.steps[4] == Round(activation_order=False, hessian="float")
    token = chosen.steps[3]
    assert isinstance(token, TokenInput)
    assert (token.bits, token.search, token.clip_ratio) == (4, False, 0.9)
    assert chosen.prefix == "none"
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_quarot_when_settings_change_expect_the_steps_to_follow() -> None:
    chosen = get_recipe("quarot", heads="online", activation_clip="search", prefix="bos")
    assert chosen.steps[0] == RotateResidual(heads=False)
    assert chosen.steps[1] == Rotate(("attention_output", "mlp_output"))
    assert chosen.prefix == "bos"
    fused = get_recipe("quarot", heads="fused", hessian="quantized")
    assert [type(step) for step in fused.steps] == [RotateResidual, Rotate, TokenInput, Round]
    assert fused.steps[-1] == Round(activation_order=False)
    weight_only = get_recipe("quarot", activation_bits=16, rounding="rtn")
    assert [type(step) for step in weight_only.steps] == [RotateResidual, Rotate, Round]
    assert weight_only.steps[0] == RotateResidual(heads=True)
    assert get_recipe("quarot", rotate_keys=True).steps == (*get_recipe("quarot").steps, RotateKeys())


def test_quarot_when_clip_ratio_is_no_share_expect_error() -> None:
    with pytest.raises(RecipeError, match="clip_ratio"):
        get_recipe("quarot", clip_ratio=0.0)


def test_recipe_when_a_step_of_the_whole_model_comes_late_expect_error() -> None:
    with pytest.raises(RecipeError, match="'rotate_residual' changes the whole model"):
        Recipe("own", "", (Round(), RotateResidual()))
