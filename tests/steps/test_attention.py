"""SmoothAttention and the order of hidden channels on a real block: nothing changes but what quantizers see."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mergequant.calibration import BlockContext
from mergequant.errors import RecipeError
from mergequant.steps import Reorder, SmoothAttention

Opener = Callable[..., BlockContext]
HEAD, LOUD = 10, 25.0  # channels of a head of the small families


def output(context: BlockContext) -> Tensor:
    return context.chain.run(context.chain.hidden[0])


def coarse(keys: Tensor) -> Tensor:
    """Four bits, asymmetric, a scale and zero per token and head: QServe's cache."""
    heads = keys.unflatten(-1, (-1, HEAD))
    low, high = heads.amin(-1, keepdim=True), heads.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-9)
    return (((heads - low) / step).round() * step + low).flatten(-2)


def loss_of_coarse_keys(context: BlockContext) -> float:
    before = output(context)
    keys = context.module.get_submodule("self_attn.k_proj")
    handle = keys.register_forward_hook(lambda _module, _args, value: coarse(value))
    after = output(context)
    handle.remove()
    return float((after - before).norm() / before.norm())


def plant_loud_keys(context: BlockContext) -> None:
    """A pair of channels in every key head is loud, and as quiet in the queries: the function stays."""
    with torch.no_grad():
        for name, factor in (("k_proj", LOUD), ("q_proj", 1 / LOUD)):
            linear = context.module.get_submodule(f"self_attn.{name}")
            assert isinstance(linear, nn.Linear)
            heads = linear.weight.unflatten(0, (-1, HEAD))
            heads[:, [3, 3 + HEAD // 2]] *= factor


@pytest.mark.parametrize("family", ["llama", "llama_no_gqa", "phi3", "opt", "gemma2"])
@pytest.mark.parametrize("prefix", [None, ([1, 5], True)])
def test_smooth_attention_expect_the_block_to_keep_its_function(
    open_block: Opener, family: str, prefix: tuple[list[int], bool] | None
) -> None:
    context = open_block(family, prefix)
    before = output(context)
    held = None if context.chain.prefix is None else context.chain.prefix.keys.clone()
    SmoothAttention().run(context)
    assert context.figures["block"]["attention_smoothed"] == 1
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    if held is not None and context.chain.prefix is not None:
        assert not torch.equal(context.chain.prefix.keys, held)


def test_smooth_attention_when_queries_and_keys_are_normed_expect_the_block_left_alone(open_block: Opener) -> None:
    context = open_block("qwen3")
    before = output(context)
    SmoothAttention().run(context)
    assert context.figures["block"]["attention_smoothed"] == 0
    assert torch.equal(output(context), before)


def test_smooth_attention_when_key_channels_are_loud_expect_less_loss_in_a_cache_of_4_bits(open_block: Opener) -> None:
    context = open_block("llama")
    plain = loss_of_coarse_keys(context)
    plant_loud_keys(context)
    loud = loss_of_coarse_keys(context)
    SmoothAttention().run(context)
    smoothed = loss_of_coarse_keys(context)
    assert loud > 2 * plain
    assert smoothed < 0.6 * loud


def test_smooth_attention_when_alpha_is_none_of_an_exponent_expect_error() -> None:
    with pytest.raises(RecipeError, match="alpha"):
        SmoothAttention(alpha=1.5)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gemma2", "qwen3"])
def test_reorder_expect_falling_inputs_and_the_same_function(open_block: Opener, family: str) -> None:
    context = open_block(family)
    site = next(site for site in context.structure.sites if site.kind == "mlp_output")
    before = output(context)
    Reorder().run(context)
    assert context.figures[site.name]["reordered"] == 1
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    largest = torch.stack([inputs.abs().amax(0) for inputs in context.capture(site)]).amax(0)
    assert bool((largest[:-1] >= largest[1:] * (1 - 1e-5)).all())


@pytest.mark.parametrize("step", [SmoothAttention(), Reorder()])
def test_step_when_a_site_was_opened_before_expect_error(open_block: Opener, step: SmoothAttention | Reorder) -> None:
    context = open_block("llama")
    context.site(context.structure.sites[0])
    with pytest.raises(RecipeError, match="put it before"):
        step.run(context)
