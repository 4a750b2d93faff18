"""SpQR's and GWQ's steps and settings."""

from typing import Any

import pytest

from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import Round, RoundSparse, WeightGradients


def test_spqr_when_plain_expect_the_papers_defaults() -> None:
    chosen = get_recipe("spqr")
    (last,) = chosen.steps
    assert isinstance(last, RoundSparse)
    assert isinstance(last, Round)
    assert (last.bits, last.group_size, last.tile, last.statistic_bits) == (3, 16, 16, 3)
    assert (last.threshold, last.largest_share, last.damping, last.activation_order) == (0.2, 0.01, 1.0, True)
    assert (last.chosen_by, last.leave_one_out, last.whole_zeros) == ("error", True, False)
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_gwq_when_plain_expect_one_sample_and_one_percent_of_every_matrix() -> None:
    chosen = get_recipe("gwq")
    assert chosen.steps[0] == WeightGradients(share=0.01, samples=1, accumulate="squares")
    last = chosen.steps[1]
    assert isinstance(last, RoundSparse)
    assert (last.method, last.bits, last.group_size, last.tile, last.whole_zeros) == ("rtn", 3, 128, 0, True)
    assert last.chosen_by == "gradient"
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen
    assert [type(step) for step in get_recipe("gwq", outliers="magnitude").steps] == [RoundSparse]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "rtn"}, "in a sweep"),
        ({"method": "quantease"}, "gptq or rtn"),
        ({"chosen_by": "gradients"}, "gradient"),
        ({"threshold": 0.0}, "threshold"),
        ({"share": 0.0}, "shares"),
        ({"largest_share": 1.5}, "shares"),
        ({"zeros": False}, "zero points"),
    ],
)
def test_round_sparse_when_settings_contradict_each_other_expect_error(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        RoundSparse(**settings)


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.0}, {"samples": 0}])
def test_weight_gradients_when_nothing_would_be_chosen_expect_error(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="weight_gradients"):
        WeightGradients(**settings)
