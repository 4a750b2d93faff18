"""Fine-tuning of a block: the loop is what is rounded afterwards, it learns, and it wants static inputs."""

from collections.abc import Callable

import pytest
import torch

from mergequant.calibration import BlockContext
from mergequant.errors import RecipeError
from mergequant.steps import Ranges, Rotate, Round, SiteStep, Split, TensorInput, TokenInput, TuneBlock

Opener = Callable[..., BlockContext]


def act(context: BlockContext, *steps: SiteStep) -> None:
    for site in context.structure.sites:
        own = context.site(site)
        for step in steps:
            if step.applies_to(site):
                step.run(own)


def error(context: BlockContext, target: torch.Tensor) -> float:
    found = context.chain.run(context.chain.hidden[0])
    return float((found - target).square().sum() / (target - context.chain.hidden[0]).square().sum())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tune_block_expect_less_error_at_the_output_than_before(open_block: Opener, family: str) -> None:
    errors = []
    rounding = Round(method="rtn", clip=False)
    for tuned in (False, True):
        context = open_block(family)
        target = context.chain.run(context.chain.hidden[0])
        act(context, Rotate(("mlp_output",)), TensorInput())
        if tuned:
            TuneBlock(epochs=30, batch_tokens=64).run(context)
        act(context, rounding if tuned else Round(method="rtn"))
        errors.append(error(context, target))
    figures = context.figures["block"]
    assert figures["loss_last_epoch"] < 0.8 * figures["loss_first_epoch"]
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] == pytest.approx(figures["loss_last_epoch"], rel=0.25)  # nothing learnt is lost in rounding


def test_tune_block_when_inputs_are_dynamic_expect_error(open_block: Opener) -> None:
    context = open_block("llama")
    act(context, TokenInput())
    with pytest.raises(RecipeError, match="static steps"):
        TuneBlock().run(context)


def test_tune_block_when_nothing_is_trained_expect_error() -> None:
    with pytest.raises(RecipeError, match="positive"):
        TuneBlock(epochs=0)


@pytest.mark.parametrize("other", ["hadamard-static", "static"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tune_block_when_steps_are_per_channel_expect_less_error_with_weights_left_to_round(
    open_block: Opener, family: str, other: str
) -> None:
    errors = []
    for tuned in (False, True):
        context = open_block(family, prefix=([1], True))
        target = context.chain.run(context.chain.hidden[0])
        act(context, Ranges(("norm",)), Split(("norm",), (0.1,), 4, stagger=True))
        if other == "static":
            act(context, Ranges(("attention_output", "mlp_output"), 8))
        else:
            act(context, Rotate(("attention_output", "mlp_output")), TensorInput(("attention_output", "mlp_output")))
        if tuned:
            weights = {name: weight.clone() for own in context.sites.values() for name, weight in own.weights.items()}
            TuneBlock(4, 5e-3, 0.0, 2e-2, epochs=8, batch_tokens=64).run(context)
            assert all(own.targets is None for own in context.sites.values())
            for own in context.sites.values():  # scales moved, so the float block computes what it did
                assert not own.rotation or not torch.equal(
                    own.weights[own.site.consumers[0]], weights[own.site.consumers[0]]
                )
            assert error(context, target) < 1e-8
        act(context, Round(method="rtn"))
        errors.append(error(context, target))
    figures = context.figures["block"]
    assert figures["loss_last_epoch"] < figures["loss_first_epoch"]
    assert errors[1] < errors[0]
