"""Linears that read the residual stream: what they are scaled and shifted by stays with their input quantizers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.nn import QuantLinear
from mergequant.steps import Ranges, Rotate, Round, ScaleChannels, ShiftChannels, Step, TensorInput, TokenInput
from mergequant.steps.module_output import ModuleOutput
from mergequant.steps.scale import clippable_rows

Opener = Callable[..., BlockContext]
MOVES: tuple[Step, ...] = (ShiftChannels(), ScaleChannels(("stream",), "threshold", (0.1,)))


def streams(context: BlockContext) -> list[SiteContext]:
    return [context.site(site) for site in context.structure.sites if site.kind == "stream"]


def act(own: SiteContext, *steps: Step) -> SiteContext:
    for step in steps:
        step.run(own)  # type: ignore[attr-defined]
    return own


def inputs(own: SiteContext) -> Tensor:
    return torch.cat(list(own.chunks()))


def output(context: BlockContext) -> Tensor:
    return context.chain.run(context.chain.hidden[0])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_moves_on_a_stream_expect_block_and_site_to_agree_on_the_same_function(open_block: Opener) -> None:
    context = open_block("bert")
    before = output(context)
    for own in streams(context):
        old, weight = inputs(own), own.stacked_weight()
        act(own, *MOVES)
        scale, shift = own.block.held[own.site.name]
        assert float(scale.min()) < 0.9
        torch.testing.assert_close(inputs(own), old * scale + shift, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.stacked_weight() * scale, weight, rtol=1e-5, atol=1e-6)
        moved = inputs(own)
        own.close()
        torch.testing.assert_close(inputs(own), moved, rtol=1e-4, atol=1e-4)  # what is captured anew comes so
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-4)


CODED: dict[str, tuple[Step, ...]] = {
    "float": (),
    "token": (TokenInput(bits=8, search=False),),
    "tensor": (TensorInput(bits=8, steps=1),),
    "channel": (Ranges(bits=8),),
}


@pytest.mark.parametrize("coded", CODED)
def test_round_behind_moves_expect_them_in_the_input_quantizer(coded: str, open_block: Opener) -> None:
    context = open_block("bert")
    before = output(context)
    for own in streams(context):
        act(own, *MOVES)
        held, largest = own.block.held[own.site.name], inputs(own).abs().amax(0)
        act(own, *CODED[coded], Round(method="rtn", bits=8, clip=False))
        for name in own.site.consumers:
            module = context.module.get_submodule(name)
            assert isinstance(module, QuantLinear)
            assert not module._forward_pre_hooks
            assert (module.spec.input.per_channel, module.spec.input.shifts) == (True, True)
            assert module.input_quantizer is not None
            assert module.input_quantizer.multiplier is not None
            step = {"tensor": largest.max() / 127, "channel": largest / 127}.get(coded, torch.ones(()))
            torch.testing.assert_close(module.input_quantizer.multiplier, held[0] / step)
        context.figures.clear()
    assert relative(output(context), before) < 0.03


def test_round_behind_moves_and_a_rotation_with_static_steps_is_refused(open_block: Opener) -> None:
    own = streams(open_block("bert"))[0]
    with pytest.raises(RecipeError, match="in front of an online rotation"):
        act(own, *MOVES, Rotate(), TensorInput(bits=8), Round())
    own = streams(open_block("bert"))[1]
    act(own, *MOVES, Rotate(), TokenInput(bits=8), Round(bits=8))  # a scale per token is found behind both


def test_module_behind_a_stream_ends_where_the_next_one_begins(open_block: Opener) -> None:
    context = open_block("bert")
    first, second = streams(context)
    assert (ModuleOutput(first)._begin, ModuleOutput(first)._end) == ("attention.self.query", "intermediate.dense")
    assert (ModuleOutput(second)._begin, ModuleOutput(second)._end) == ("intermediate.dense", None)
    for own in (first, second):
        judge = ModuleOutput(own)
        assert judge.loss(own.weights) == 0
        assert judge.loss({name: weight * 1.01 for name, weight in own.weights.items()}) > 0


def test_clippable_rows_in_front_of_attention_are_the_values(open_block: Opener) -> None:
    first, second = streams(open_block("bert"))
    assert clippable_rows(first) == {"attention.self.value": slice(0, 40)}
    assert clippable_rows(second) == {"intermediate.dense": slice(None)}
