"""MergeQuant's switches: what fine-tuning adds to the steps, and what it refuses."""

import pytest

from mergequant.errors import RecipeError
from mergequant.recipes import get_recipe


def test_mergequant_plus_when_fine_tuned_expect_training_before_compensation_and_gptq() -> None:
    plain, tuned = get_recipe("mergequant-plus"), get_recipe("mergequant-plus", fine_tune=3)
    names = [step.name for step in tuned.steps]
    assert names[-3:] == ["tune_block", "compensate", "round"]
    assert [name for name in names if name != "tune_block"] == [step.name for step in plain.steps]
    training = tuned.steps[-3].to_dict()
    assert training["epochs"] == 3
    assert training["weight_rate"] == 0  # weights are left to GPTQ
    assert training["scale_rate"] > 0


@pytest.mark.parametrize(
    "settings", [{"fine_tune": -1}, {"fine_tune": 1, "other": "hadamard"}, {"fine_tune": 1, "compensation": "low_rank"}]
)
def test_mergequant_plus_when_fine_tuning_cannot_be_expect_error(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="fine_tune"):
        get_recipe("mergequant-plus", **settings)
