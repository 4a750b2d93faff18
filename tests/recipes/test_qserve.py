"""QServe's steps and settings."""

import pytest

from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import Reorder, RotateResidual, Round, ScaleChannels, SmoothAttention, TokenInput


def test_qserve_when_plain_expect_the_papers_defaults() -> None:
    chosen = get_recipe("qserve")
    kinds = [RotateResidual, SmoothAttention, Reorder, ScaleChannels, TokenInput, Round]
    assert [type(step) for step in chosen.steps] == kinds
    assert chosen.steps[1] == SmoothAttention(0.5)
    assert chosen.steps[3] == ScaleChannels(("mlp_output",), "smooth", (0.3,))
    assert chosen.steps[4] == TokenInput(bits=8, search=False)
    last = chosen.steps[5]
    assert isinstance(last, Round)
    assert (last.levels, last.bits, last.group_size, last.method, last.damping) == (2, 4, 128, "gptq", 0.01)
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_qserve_when_rows_are_one_group_expect_the_per_channel_settings() -> None:
    chosen = get_recipe("qserve", group_size=0, attention_alpha=0.0)
    assert not any(isinstance(step, (Reorder, SmoothAttention)) for step in chosen.steps)
    assert ScaleChannels(("mlp_output",), "smooth", (0.1,)) in chosen.steps


def test_round_when_two_levels_have_other_bits_expect_error() -> None:
    with pytest.raises(RecipeError, match="4-bit"):
        Round(bits=8, levels=2)
