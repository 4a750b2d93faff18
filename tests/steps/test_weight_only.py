"""Rounding steps of weight-only recipes: by the worst token, by signed gradients, and without data."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergequant.calibration import BlockContext
from mergequant.errors import RecipeError
from mergequant.nn import QuantLinear
from mergequant.solvers.dmmv import MoveName
from mergequant.steps import (
    LearnRounding,
    Round,
    RoundHalfQuadratic,
    RoundLearned,
    RoundMinMax,
    SiteStep,
    TokenInput,
)

Opener = Callable[..., BlockContext]
LEARN = LearnRounding(3, 4, epochs=30, batch_tokens=64)
LEARNED = RoundLearned(bits=3, group_size=4, zeros=True)


def act(context: BlockContext, *steps: SiteStep) -> None:
    for site in context.structure.sites:
        for step in steps:
            step.run(context.site(site))


def error(context: BlockContext, target: Tensor, chunk: int = 0) -> float:
    found = context.chain.run(context.chain.hidden[chunk])
    return float((found - target).square().sum() / (target - context.chain.hidden[chunk]).square().sum())


@pytest.mark.parametrize("moves", ["swap", "swap_and_single"])
@pytest.mark.parametrize("tokens", [0, 128])
def test_min_max_when_gptq_is_polished_expect_a_lower_worst_error_at_no_squared_loss(
    open_block: Opener, moves: MoveName, tokens: int
) -> None:
    errors = {}
    for step in (Round(bits=3, zeros=True), RoundMinMax(bits=3, zeros=True, moves=moves, tokens=tokens)):
        context = open_block()
        own = context.site(context.structure.sites[0])
        own.open()
        inputs = torch.cat(list(own.chunks()))
        weights = {name: weight.clone() for name, weight in own.weights.items()}
        step.run(own)
        made = {name: context.module.get_submodule(name) for name in weights}
        assert all(isinstance(layer, QuantLinear) for layer in made.values())
        rows = torch.cat([inputs @ (made[name].decoded_weight() - weight).t() for name, weight in weights.items()], 1)
        errors[step.name] = rows.abs().amax(0), rows.square().sum(0)
    if not tokens:
        assert bool((errors["round_min_max"][0] <= errors["round"][0] * (1 + 1e-4)).all())
    assert float(errors["round_min_max"][0].mean()) < (1 if tokens else 0.98) * float(errors["round"][0].mean())
    assert bool((errors["round_min_max"][1] <= errors["round"][1] * (1 + 1e-3)).all())
    figures = context.figures[own.site.name]
    assert figures["worst_error"] < figures["worst_error_start"]


def test_min_max_when_settings_make_no_sense_expect_a_reason() -> None:
    with pytest.raises(RecipeError, match="use levels=1"):
        RoundMinMax(levels=2)
    with pytest.raises(RecipeError, match="number of tokens"):
        RoundMinMax(tokens=-1)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_learned_rounding_expect_less_error_at_the_output_than_nearest(
    open_block: Opener, family: str, zeros: bool
) -> None:
    context = open_block(family)
    target = context.chain.run(context.chain.hidden[0])
    act(context, Round(method="rtn", bits=3, group_size=4, clip=False, zeros=zeros))
    nearest = error(context, target)
    context = open_block(family)
    LearnRounding(3, 4, zeros, epochs=30, batch_tokens=64).run(context)
    figures = context.figures["block"]
    act(context, RoundLearned(bits=3, group_size=4, zeros=zeros))
    assert figures["loss_last_epoch"] < 0.9 * figures["loss_first_epoch"]
    assert error(context, target) < 0.9 * nearest
    assert error(context, target) == pytest.approx(figures["loss_last_epoch"], rel=0.1)  # nothing is lost in storing
    moved = [values["moved"] for name, values in context.figures.items() if "moved" in values]
    assert all(0 < share < 0.5 for share in moved)


def test_learned_rounding_when_ranges_are_left_alone_expect_those_of_the_weights(open_block: Opener) -> None:
    context = open_block()
    LearnRounding(4, 8, epochs=1, range_rate=0).run(context)
    own = context.site(context.structure.sites[0])
    for name, solution in own.solutions.items():
        wanted = Round(method="rtn", group_size=8, clip=False, zeros=True).quantizer(8).find(own.weights[name])
        assert torch.allclose(solution.quantized.scale, wanted[0])


def test_learned_rounding_when_steps_are_amiss_expect_a_reason(open_block: Opener) -> None:
    context = open_block()
    with pytest.raises(RecipeError, match="put learn_rounding before"):
        act(context, LEARNED)
    act(context, TokenInput())
    with pytest.raises(RecipeError, match="weight-only"):
        LEARN.run(context)
    with pytest.raises(RecipeError, match="must be positive"):
        LearnRounding(epochs=0)


def test_half_quadratic_when_a_site_is_rounded_expect_less_error_than_nearest(open_block: Opener) -> None:
    losses = []
    for step in (
        Round(method="rtn", bits=3, group_size=8, clip=False, zeros=True),
        RoundHalfQuadratic(bits=3, group_size=8),
    ):
        context = open_block()
        own = context.site(context.structure.sites[0])
        weight = own.stacked_weight()
        step.run(own)
        made = torch.cat([solution.quantized.decode() for solution in own.solutions.values()])
        losses.append(float((made - weight).abs().pow(0.7).sum()))
    assert losses[1] < 0.97 * losses[0]


def test_half_quadratic_when_settings_make_no_sense_or_inputs_are_codes_expect_a_reason(open_block: Opener) -> None:
    for bad in ({"zeros": False}, {"clip": True}, {"method": "gptq"}):
        with pytest.raises(RecipeError, match="round_half_quadratic"):
            RoundHalfQuadratic(**bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="leave the input in floating point"):
        act(open_block(), TokenInput(), RoundHalfQuadratic())
