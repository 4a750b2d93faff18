"""Scaling and clipping at work on a block: what is moved where, what is chosen, what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError, StructureError
from mergequant.models.roles import SiteKind
from mergequant.nn import QuantLinear
from mergequant.steps import ClipWeights, Rotate, Round, ScaleChannels, Step, TokenInput
from mergequant.steps.module_output import LinearOutput, ModuleOutput
from mergequant.steps.scale import clippable_rows

Opener = Callable[..., BlockContext]
KINDS: tuple[SiteKind, ...] = ("norm", "attention_output", "mlp_output")


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


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "phi3", "llama_tied_wide_heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_channels_expect_block_and_site_to_agree_on_the_same_function(
    open_block: Opener, family: str, kind: SiteKind
) -> None:
    context = open_block(family)
    own, before = site(context, kind), output(context)
    old_inputs, old_weight = inputs(own), own.stacked_weight()
    act(own, ScaleChannels(exponents=(0.6,)))
    tight = {"rtol": 1e-4, "atol": 1e-4 * float(before.abs().max())}
    torch.testing.assert_close(output(context), before, **tight)
    scaled, weight = inputs(own), own.stacked_weight()
    torch.testing.assert_close(scaled @ weight.t(), old_inputs @ old_weight.t(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(weight, old_weight)
    modules = torch.cat([context.linear(name).weight for name in own.site.consumers])
    torch.testing.assert_close(modules, weight)
    own.close()
    torch.testing.assert_close(inputs(own), scaled, rtol=1e-4, atol=1e-5)  # what is captured anew comes scaled


def test_scale_channels_when_query_heads_share_values_expect_one_scale_for_them(open_block: Opener) -> None:
    own = site(open_block("llama"), "attention_output")
    before = own.stacked_weight()
    act(own, ScaleChannels(exponents=(0.5,)))
    scale = (own.stacked_weight() / before).median(0).values
    channel = torch.tensor(own.site.producer.channel)
    assert channel.unique().numel() < channel.numel()
    for row in channel.unique():
        torch.testing.assert_close(scale[channel == row], scale[channel == row][:1].expand((channel == row).sum()))


@pytest.mark.parametrize("rounded", [False, True])
def test_scale_channels_when_prefix_and_values_are_rounded_or_not_expect_function_kept(
    open_block: Opener, rounded: bool
) -> None:
    context = open_block("llama", ([1], True))
    if rounded:
        act(site(context), Round(bits=8))
    before = output(context)
    values = context.chain.prefix.values.clone()
    act(site(context, "attention_output"), ScaleChannels())
    assert not torch.equal(context.chain.prefix.values, values)
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_scale_channels_when_another_site_holds_the_producer_expect_its_copy_to_follow(open_block: Opener) -> None:
    """A recipe may round all sites after all are scaled: v_proj must then be rounded as it is by then."""
    context = open_block("llama")
    first, second = site(context), site(context, "attention_output")
    act(first, ScaleChannels())
    act(second, ScaleChannels())
    for name in first.site.consumers:
        torch.testing.assert_close(first.weights[name], context.linear(name).weight)
    before = output(context)
    act(first, Round(bits=8))
    assert isinstance(context.module.get_submodule(first.site.consumers[0]), QuantLinear)
    assert float((output(context) - before).norm() / before.norm()) < 0.02


def test_scale_channels_when_norm_is_stored_in_16_bits_expect_columns_to_make_up_for_it(open_block: Opener) -> None:
    context = open_block("llama")
    context.chain.shell.stored_dtype = torch.bfloat16
    before = output(context)
    own = act(site(context), ScaleChannels(exponents=(0.7,)))
    gain = context.module.get_submodule(own.site.norm.name).weight
    assert torch.equal(gain.bfloat16().float(), gain)
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_scale_channels_when_nothing_can_take_up_a_scale_expect_site_left_alone(open_block: Opener) -> None:
    context = open_block("opt_gelu_projected")  # a GELU between fc1 and fc2
    own = site(context, "mlp_output")
    before = own.stacked_weight()
    act(own, ScaleChannels())
    assert torch.equal(own.stacked_weight(), before)
    assert context.figures[own.site.name]["scaled"] == 0
    with pytest.raises(StructureError, match="can take up a scale"):
        own.scale_channels(torch.ones(own.site.width))


@pytest.mark.parametrize("first", [Rotate(), TokenInput(), ClipWeights()], ids=lambda step: step.name)
def test_scale_channels_when_site_was_changed_before_expect_refused(open_block: Opener, first: Step) -> None:
    with pytest.raises(RecipeError, match=r"input_layernorm: channels are scaled before"):
        act(site(open_block()), first, ScaleChannels())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation_bits", [4, 16])
def test_search_expect_the_exponent_of_least_module_error(
    open_block: Opener, kind: SiteKind, activation_bits: int
) -> None:
    losses = {}
    for exponent in (0.0, 0.3, 0.6, 0.9):
        context = open_block()
        own = site(context, kind)
        module = (ModuleOutput if kind == "norm" else LinearOutput)(own)
        act(own, ScaleChannels(rule="aware", exponents=(exponent,)))
        scaled = act(own, *([TokenInput(bits=activation_bits, search=False)] if activation_bits < 16 else []))
        act(scaled, Round(method="rtn", bits=3, clip=False))
        weights = {name: solution.quantized.decode() for name, solution in scaled.solutions.items()}
        losses[exponent] = independent_loss(module, own, weights)
    chosen = site(open_block(), kind)
    step = ScaleChannels(
        rule="aware", exponents=tuple(losses), weight_bits=3, activation_bits=activation_bits, chunks=1
    )
    act(chosen, step)
    figures = chosen.block.figures[chosen.site.name]
    best = min(losses, key=lambda exponent: losses[exponent])
    assert losses[figures["scale_exponent"]] == pytest.approx(losses[best], rel=0.01)
    assert figures["scale_loss"] == pytest.approx(losses[best], rel=0.05)


def independent_loss(module: ModuleOutput | LinearOutput, own: SiteContext, weights: dict[str, Tensor]) -> float:
    """The loss of the quantized block as it stands, or of the site's linear with its scaled input."""
    if isinstance(module, ModuleOutput):
        return sum(
            float((output - target).square().mean()) for output, target in zip(module._outputs(), module._targets)
        ) / len(module._targets)
    seen = own.scheme.values(own.sample("calibration", 4096))
    name = own.site.consumers[0]
    return float((seen @ weights[name].t() - module._inputs @ module._weights[name].t()).square().mean())


def test_module_output_when_tried_expect_parameters_back_and_no_loss_without_change(open_block: Opener) -> None:
    context = open_block()
    own = site(context)
    parameters = {name: context.linear(name).weight for name in own.site.consumers}
    module = ModuleOutput(own, 5)
    assert module.loss(own.weights) == 0
    assert module.loss(own.weights, lambda x: 1.1 * x) > 0
    with pytest.raises(KeyError):
        module.loss({own.site.consumers[0]: own.weights[own.site.consumers[0]] * 2})
    assert all(context.linear(name).weight is parameter for name, parameter in parameters.items())
    assert not any(context.linear(name)._forward_pre_hooks for name in parameters)


def test_module_output_at_the_mlp_expect_attention_run_once_and_the_block_as_before(open_block: Opener) -> None:
    context = open_block()
    own = site(context, "norm", 1)
    calls = []
    handle = context.module.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    module, before = ModuleOutput(own), output(context)
    calls.clear()
    doubled = {name: weight * 2 for name, weight in own.weights.items()}
    loss = module.loss(doubled)
    assert not calls
    handle.remove()
    assert "forward" not in vars(context.module.self_attn)
    assert torch.equal(output(context), before)
    with torch.no_grad():
        for name in own.site.consumers:
            context.linear(name).weight.mul_(2)
    hidden = context.chain.hidden[0]
    assert loss == pytest.approx(float((context.chain.run(hidden) - before).square().mean()), rel=1e-5)


def test_module_output_expect_attention_to_end_before_the_mlp(open_block: Opener) -> None:
    context = open_block()
    own = site(context)
    module = ModuleOutput(own)
    halved = {name: weight / 2 for name, weight in own.weights.items()}
    loss = module.loss(halved)
    with torch.no_grad():
        context.module.mlp.down_proj.weight.mul_(3)
    assert module.loss(halved) == loss


@pytest.mark.parametrize(("family", "rows"), [("llama", (0, 20)), ("phi3", (60, 80))])
def test_clip_weights_expect_values_clipped_and_queries_and_keys_left_alone(
    open_block: Opener, family: str, rows: tuple[int, int]
) -> None:
    own = site(open_block(family))
    assert own.site.producer is None
    clippable = clippable_rows(own)
    name = own.site.consumers[-1]
    assert clippable == {name: slice(*rows)}
    act(own, ClipWeights(weight_bits=3, group_size=8))
    assert own.targets is not None
    for other, target in own.targets.items():
        changed = (target != own.weights[other]).any(1).nonzero().flatten()
        inside = (changed >= rows[0]) & (changed < rows[1]) & (other == name)
        assert bool(inside.all())
    assert own.block.figures[own.site.name]["clamped_weights"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_clip_weights_expect_less_output_error_than_without(open_block: Opener, kind: SiteKind) -> None:
    rounding = Round(method="rtn", bits=3, group_size=8, clip=False, fit_groups=True)
    errors = []
    for steps in ([], [ClipWeights(weight_bits=3, group_size=8)]):
        own = act(site(open_block(), kind, -1), *steps, rounding)
        errors.append(own.block.figures[own.site.name]["output_error"])
    assert errors[1] < errors[0]
