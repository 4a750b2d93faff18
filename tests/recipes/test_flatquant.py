"""FlatQuant's steps, settings and results."""

import pytest
import torch

import mergequant
from families import make_model
from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import Flatten, Round


def test_flatquant_when_plain_expect_the_papers_defaults() -> None:
    chosen = get_recipe("flatquant")
    assert [type(step) for step in chosen.steps] == [Flatten, Round]
    flatten = chosen.steps[0]
    assert isinstance(flatten, Flatten)
    assert (flatten.rate, flatten.clip_rate, flatten.epochs, flatten.alpha) == (5e-3, 5e-2, 15, 0.3)
    assert chosen.steps[1] == Round(clip=False)
    assert chosen.prefix == "none"
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen


def test_flatquant_when_weight_only_expect_error() -> None:
    with pytest.raises(RecipeError, match="awq"):
        get_recipe("flatquant", activation_bits=16)


def test_flatquant_when_transforms_are_identities_and_nothing_is_clipped_expect_rtn_bit_for_bit() -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    still = {"epochs": 0, "start": "identity", "scale": False, "clip": False, "rounding": "rtn"}
    logits = []
    for name, settings in (("flatquant", still), ("rtn", {"clip": False})):
        made = mergequant.quantize(model, name, data=tokens, samples=4, seqlen=24, settings=settings)
        with torch.no_grad():
            logits.append(made.model(tokens).logits)
    assert torch.equal(*logits)
