"""`Round`: settings that contradict one another are refused before anything runs."""

from typing import Any

import pytest
import torch

from mergequant.errors import RecipeError
from mergequant.steps import Round


@pytest.mark.parametrize("changes", [{}, {"method": "rtn"}, {"activation_order": False, "levels": 2}], ids=str)
def test_round_when_moving_groups_cannot_be_expect_what_they_need(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="activation_order=False"):
        Round(group_size=4, static_groups=False, **changes)


def test_round_when_groups_move_expect_other_scales_than_those_of_the_weights_as_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(8, 32, generator=generator), torch.randn(64, 32, generator=generator)
    gram = inputs.T @ inputs
    moving = Round(group_size=8, clip=False, static_groups=False, activation_order=False)
    still = Round(group_size=8, clip=False, activation_order=False)
    found = [step.solve(weight, gram, 8).quantized.scale for step in (moving, still)]
    assert torch.equal(found[0][:, 0], found[1][:, 0])  # the first group comes before any error
    assert not torch.equal(found[0][:, 1:], found[1][:, 1:])
