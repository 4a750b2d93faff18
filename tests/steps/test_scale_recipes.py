"""SmoothQuant and AWQ on planted channels, where each wins as its paper says; what a plan promises of groups."""

from collections.abc import Callable

import torch

from families import make_model
from mergequant.calibration import BlockContext
from mergequant.models import ModelShell
from mergequant.pipeline.blocks import quantize_block
from mergequant.pipeline.plan import make_plan
from mergequant.recipes import get_recipe

Opener = Callable[..., BlockContext]


def block_error(context: BlockContext, name: str, **settings: object) -> float:
    """Squared error of the block's output on a held-out chunk, relative to what the block adds to its input."""
    hidden = context.chain.hidden[1]
    target = context.chain.run(hidden)
    quantize_block(context, get_recipe(name, **settings))
    return float((context.chain.run(hidden) - target).square().sum() / (target - hidden).square().sum())


def planted(open_block: Opener, strong: float) -> BlockContext:
    """A block whose first norm has a few channels with strong gains and columns as much weaker: a scale pair."""
    context = open_block("llama")
    with torch.no_grad():
        context.module.input_layernorm.weight[[2, 9, 30]] *= strong
        for name in ("q_proj", "k_proj", "v_proj"):
            context.module.get_submodule(f"self_attn.{name}").weight[:, [2, 9, 30]] /= strong
    return context


def test_smoothquant_when_scale_pairs_are_planted_expect_error_far_below_rounding_alone(open_block: Opener) -> None:
    plain = block_error(planted(open_block, 100), "rtn", weight_bits=8, activation_bits=8)
    smooth = block_error(planted(open_block, 100), "smoothquant")
    assert smooth < plain / 10
    even = block_error(open_block("llama"), "smoothquant")
    assert even / 3 < smooth < 3 * even  # smoothing undoes the pairs


def test_smoothquant_when_alpha_sweeps_expect_its_ends_worse_than_the_middle(open_block: Opener) -> None:
    def error(alpha: float) -> float:
        return block_error(planted(open_block, 100), "smoothquant", weight_bits=4, activation_bits=4, alpha=alpha)

    middle = min(error(alpha) for alpha in (0.4, 0.5, 0.6))
    assert middle < error(1.0)
    assert middle < error(0.0)


def test_awq_when_strong_inputs_meet_normal_columns_expect_error_below_rounding_alone(open_block: Opener) -> None:
    def strong() -> BlockContext:
        context = open_block("llama")
        with torch.no_grad():
            context.module.input_layernorm.weight[[2, 9, 30]] *= 20
            context.module.post_attention_layernorm.weight[[4, 11]] *= 20
        return context

    settings = {"weight_bits": 3, "group_size": 0}
    neither = block_error(strong(), "awq", scale=False, clip=False, **settings)
    scaled = block_error(strong(), "awq", clip=False, **settings)
    assert scaled < 0.7 * neither


def test_plan_when_groups_do_not_divide_expect_the_sizes_that_will_be_used() -> None:
    shell = ModelShell.open(make_model("llama"))  # widths 40 and 52
    planned = make_plan(shell, shell.structures, get_recipe("awq", group_size=32), 4, 24)
    assert {site.weights for site in planned.sites} == {"int4 groups of 20, rtn", "int4 groups of 26, rtn"}
    assert {site.inputs for site in planned.sites} == {"float"}
    assert planned.sites[0].steps == ("scale_channels", "clip_weights", "round")
