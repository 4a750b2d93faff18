"""Shifts at work on a block: what is moved where, what is chosen, what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError, StructureError
from mergequant.models import BiasedNorm
from mergequant.models.roles import SiteKind
from mergequant.nn import QuantNorm
from mergequant.steps import Ranges, Rotate, Round, ScaleChannels, ShiftChannels, Step, TokenInput

Opener = Callable[..., BlockContext]
FAMILIES = ["llama", "gemma", "phi3", "opt", "llama_tied_wide_heads"]


def site(context: BlockContext, kind: SiteKind = "norm", position: int = 0) -> SiteContext:
    return context.site([site for site in context.structure.sites if site.kind == kind][position])


def act(own: SiteContext, *steps: Step) -> SiteContext:
    for step in steps:
        step.run(own)  # type: ignore[attr-defined]
    return own


def inputs(own: SiteContext) -> Tensor:
    return torch.cat(list(own.chunks()))


def output(context: BlockContext) -> Tensor:
    return context.chain.run(context.chain.hidden[0])


def same(context: BlockContext, before: Tensor) -> None:
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def norm_of(own: SiteContext) -> torch.nn.Module:
    assert own.site.norm is not None
    return own.block.module.get_submodule(own.site.norm.name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [(ShiftChannels(),), (ShiftChannels(), ScaleChannels(exponents=(0.6,)))])
def test_shift_channels_expect_block_and_site_to_agree_on_the_same_function(
    open_block: Opener, family: str, steps: tuple[Step, ...]
) -> None:
    context = open_block(family)
    own, before = site(context), output(context)
    old = {name: context.linear(name)(inputs(own)) for name in own.site.consumers}
    act(own, *steps)
    same(context, before)
    shifted = inputs(own)
    for name in own.site.consumers:
        linear = context.linear(name)
        assert linear.bias is not None
        torch.testing.assert_close(linear(shifted), old[name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(linear.weight, own.weights[name])
    own.close()
    torch.testing.assert_close(inputs(own), shifted, rtol=1e-4, atol=1e-4)  # what is captured anew comes shifted


def test_shift_channels_when_scaled_before_expect_shift_in_the_scaled_unit(open_block: Opener) -> None:
    context = open_block("opt")
    own, before = site(context), output(context)
    act(own, ScaleChannels(exponents=(0.5,)), ShiftChannels())
    same(context, before)
    shifted = inputs(own)
    torch.testing.assert_close(shifted.amax(0), -shifted.amin(0), rtol=1e-4, atol=1e-5)


def test_rule_middle_expect_every_channel_centred(open_block: Opener) -> None:
    own = act(site(open_block("llama")), ShiftChannels())
    shifted = inputs(own)
    torch.testing.assert_close(shifted.amax(0), -shifted.amin(0), rtol=1e-5, atol=1e-5)


def test_rule_mean_expect_mean_of_the_windows_middles_without_what_is_skipped(open_block: Opener) -> None:
    own = site(open_block("opt"))
    windows = inputs(own).unflatten(0, (8, 32))
    act(own, ShiftChannels(rule="mean", skip=3))
    seen = windows[:, 3:]
    shift = ((seen.amax(1) + seen.amin(1)) / 2).mean(0)
    torch.testing.assert_close(inputs(own), windows.flatten(0, 1) - shift)
    assert own.block.figures[own.site.name]["largest_shift"] == pytest.approx(float(shift.abs().max()))


def test_threshold_expect_small_shifts_left_out_whatever_their_sign(open_block: Opener) -> None:
    own = site(open_block("opt"))
    before = inputs(own)
    shift = (before.amax(0) + before.amin(0)) / 2
    act(own, ShiftChannels(threshold=0.5))
    kept = shift.abs() >= 0.5 * shift.abs().max()
    assert 0 < int(kept.sum()) < kept.numel()
    assert bool((shift[kept] < 0).any() or (shift[~kept] != 0).all())
    torch.testing.assert_close(inputs(own), before - shift * kept)
    assert own.block.figures[own.site.name]["shifted_channels"] == int(kept.sum())


@pytest.mark.parametrize(("family", "shifted"), [("llama", 0), ("opt", 1)])
def test_norms_biased_expect_norms_without_a_bias_left_alone(open_block: Opener, family: str, shifted: int) -> None:
    own = site(open_block(family))
    before = inputs(own)
    act(own, ShiftChannels(norms="biased"))
    assert own.block.figures[own.site.name]["shifted"] == shifted
    assert torch.equal(inputs(own), before) == (not shifted)
    assert not isinstance(norm_of(own), BiasedNorm)


def test_shift_channels_when_model_is_stored_in_16_bits_expect_its_bias_there_and_nothing_lost(
    open_block: Opener,
) -> None:
    context = open_block("opt")
    context.chain.shell.stored_dtype = torch.bfloat16
    before = output(context)
    own = act(site(context), ShiftChannels(), ScaleChannels(exponents=(0.7,)))
    bias = norm_of(own).bias
    assert torch.equal(bias.bfloat16().float(), bias)
    same(context, before)
    shifted = inputs(own)
    own.close()
    torch.testing.assert_close(inputs(own), shifted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention_output", "mlp_output"])
def test_shift_channels_when_no_norm_is_in_front_expect_refused_or_left_alone(
    open_block: Opener, kind: SiteKind
) -> None:
    own = site(open_block(), kind)
    act(own, ShiftChannels((kind,)))
    assert own.block.figures[own.site.name]["shifted"] == 0
    with pytest.raises(StructureError, match="can take up a shift"):
        own.shift_channels(torch.ones(own.site.width))


@pytest.mark.parametrize("first", [Rotate(), TokenInput(), Ranges()], ids=lambda step: step.name)
def test_shift_channels_when_site_was_changed_before_expect_refused(open_block: Opener, first: Step) -> None:
    with pytest.raises(RecipeError, match=r"input_layernorm: channels are shifted before"):
        act(site(open_block()), first, ShiftChannels())


@pytest.mark.parametrize(
    "wrong",
    [{"rule": "median"}, {"norms": "none"}, {"threshold": 1.5}, {"skip": -1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_shift_channels_when_a_parameter_is_wrong_expect_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="shift_channels"):
        ShiftChannels(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_round_when_inputs_are_dynamic_expect_a_norm_of_floats_with_the_bias(open_block: Opener, family: str) -> None:
    context = open_block(family)
    own = act(site(context), ShiftChannels())
    hidden, norm = context.chain.hidden[0], norm_of(own)
    before = norm(hidden)
    act(own, TokenInput(bits=8), Round(bits=8))
    after = norm_of(own)
    assert isinstance(after, QuantNorm) == (family != "opt")  # LayerNorm keeps its module: it has a bias
    torch.testing.assert_close(after(hidden), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_round_when_steps_are_static_expect_codes_of_the_shifted_channels(open_block: Opener, family: str) -> None:
    context = open_block(family)
    own = act(site(context), ShiftChannels(rule="mean"), Ranges(bits=8))
    expected = own.scheme.values(inputs(own))
    act(own, Round(bits=8))
    norm = norm_of(own)
    assert isinstance(norm, QuantNorm)
    assert norm.shift is not None
    codes = torch.cat(
        [norm(context.chain.hidden[number]).flatten(0, 1) for number in context.chain.numbers("calibration")]
    )
    assert float((codes.float() != expected).float().mean()) < 1e-3  # ties
