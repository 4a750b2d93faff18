"""OutlierTune and Outlier Suppression+ on planted channels: each wins where its paper says, and only there."""

from collections.abc import Callable

import pytest
import torch

from mergequant.calibration import BlockContext
from mergequant.pipeline.blocks import quantize_block
from mergequant.recipes import get_recipe
from mergequant.steps import Ranges, ScaleChannels, ShiftChannels, TensorInput

Opener = Callable[..., BlockContext]
STRONG = [2, 9, 30]
W6A6 = {"weight_bits": 6, "activation_bits": 6}


def error(context: BlockContext, name: str, **settings: object) -> float:
    """Squared error of the block's output on a held-out chunk, relative to what the block adds to its input."""
    hidden = context.chain.hidden[1]
    target = context.chain.run(hidden)
    quantize_block(context, get_recipe(name, **settings))
    return float((context.chain.run(hidden) - target).square().sum() / (target - hidden).square().sum())


def asymmetric(open_block: Opener, mean: float = 60.0) -> BlockContext:
    """LayerNorms with a few channels far from zero, as in [40, 60]: their spread is that of the others.

    As trained biases do, those of the consumers take the constant part away again.
    """
    context = open_block("opt")
    block, far = context.module, mean * torch.tensor([1.0, -1.0, 0.8])
    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    with torch.no_grad():
        for norm, consumers in (("self_attn_layer_norm", attention), ("final_layer_norm", ["fc1"])):
            block.get_submodule(norm).get_parameter("bias")[STRONG] += far
            for name in consumers:
                linear = context.linear(name)
                linear.bias -= linear.weight[:, STRONG] @ far
    return context


def test_outliertune_when_channels_are_asymmetric_expect_far_less_error_than_any_scale_without_a_shift(
    open_block: Opener,
) -> None:
    neither = {"shift": "none", "thresholds": 0}
    tensor = error(asymmetric(open_block), "outlier-suppression-plus", inputs="tensor", **neither, **W6A6)
    token = error(asymmetric(open_block), "rtn", **W6A6)
    tuned = error(asymmetric(open_block), "outliertune", **W6A6)
    plain = error(asymmetric(open_block), "outliertune", symmetrize=False, **W6A6)
    assert tuned < plain / 10
    assert plain < min(token, tensor) / 5


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_symmetrizing_when_channels_lie_around_zero_expect_about_the_same_error(
    open_block: Opener, family: str
) -> None:
    tuned = error(open_block(family), "outliertune", **W6A6)
    plain = error(open_block(family), "outliertune", symmetrize=False, **W6A6)
    assert 0.5 < tuned / plain < 1.5


@pytest.mark.parametrize("settings", [W6A6, {"weight_bits": 4, "activation_bits": 4}])
@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_outlier_suppression_plus_when_channels_are_asymmetric_expect_order_of_the_paper(
    open_block: Opener, inputs: str, settings: dict[str, int]
) -> None:
    def found(**own: object) -> float:
        return error(asymmetric(open_block), "outlier-suppression-plus", inputs=inputs, **settings, **own)

    shifted, scaled, neither = found(), found(shift="none"), found(shift="none", thresholds=0)
    smooth = error(asymmetric(open_block), "smoothquant", inputs=inputs, **settings)
    assert shifted < scaled < neither
    assert shifted < smooth


@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_threshold_expect_no_loss_above_that_of_no_scaling_and_few_channels_touched(
    open_block: Opener, inputs: str
) -> None:
    context = asymmetric(open_block)
    own = context.site(context.structure.sites[0])
    before = own.stacked_weight()
    shares = tuple(1 - i / 20 for i in range(20))
    step = ScaleChannels(("norm",), "threshold", shares, weight_bits=6, activation_bits=6, inputs=inputs)  # type: ignore[arg-type]
    step.run(own)
    figures = context.figures[own.site.name]
    assert figures["scale_loss"] < figures["scale_loss_first"]
    assert 0 < figures["scale_exponent"] < 1
    touched = (own.stacked_weight() != before).any(0)
    assert bool(touched[STRONG].all())
    assert int(touched.sum()) < touched.numel()


def test_outliertune_without_shift_expect_the_codes_of_smoothquant_with_alpha_one(open_block: Opener) -> None:
    """Two recipes, one grid: channels divided by their range, then one step, or a step per channel."""
    tuned, smooth = (context.site(context.structure.sites[0]) for context in (open_block("opt"), open_block("opt")))
    Ranges(("norm",), 8).run(tuned)
    ScaleChannels(("norm",), "smooth", (1.0,)).run(smooth)
    TensorInput(("norm",), 8, steps=1).run(smooth)
    codes = [torch.cat([own.scheme.values(chunk) for chunk in own.chunks()]) for own in (tuned, smooth)]
    assert float((codes[0] != codes[1]).float().mean()) < 1e-3  # ties
    folded = [own.scheme.fold(own.stacked_weight()) for own in (tuned, smooth)]
    torch.testing.assert_close(*folded)


def test_shift_before_ranges_expect_ranges_of_the_shifted_channels(open_block: Opener) -> None:
    context = asymmetric(open_block)
    own = context.site(context.structure.sites[0])
    before = torch.cat(list(own.chunks())).abs().amax(0)
    ShiftChannels(rule="mean").run(own)
    Ranges(("norm",), 8).run(own)
    step = own.scheme.step  # type: ignore[union-attr]
    assert float((step * 127)[STRONG].max()) < 0.3 * float(before[STRONG].min())


@pytest.mark.parametrize("inputs", ["token", "tensor"])
def test_outlier_suppression_plus_when_norms_come_last_expect_the_residual_stream_as_it_was(
    open_block: Opener, inputs: str
) -> None:
    """BERT: the residual connection reads what the MLP reads, so shift and scale stay with the MLP's own input."""

    def planted() -> BlockContext:
        context = open_block("bert")
        with torch.no_grad():
            far = torch.tensor([60.0, -60.0, 48.0])
            context.module.get_submodule("attention.output.LayerNorm").get_parameter("bias")[STRONG] += far
            linear = context.linear("intermediate.dense")
            linear.bias -= linear.weight[:, STRONG] @ far
        return context

    shifted, scaled, neither = (
        error(planted(), "outlier-suppression-plus", inputs=inputs, **W6A6, **own)
        for own in ({}, {"shift": "none"}, {"shift": "none", "thresholds": 0})
    )
    assert shifted < scaled < neither
    assert error(planted(), "outliertune", **W6A6) < shifted


@pytest.mark.parametrize("family", ["bert", "bert_classifier"])
def test_shift_when_norms_come_last_expect_the_block_as_before(open_block: Opener, family: str) -> None:
    context = open_block(family)
    hidden = context.chain.hidden[0]
    before = context.chain.run(hidden)
    for site in context.structure.sites:
        ShiftChannels().run(context.site(site))
        ScaleChannels(("stream",), "threshold", (0.3,)).run(context.site(site))
    assert len(context.held) == 2
    torch.testing.assert_close(context.chain.run(hidden), before, rtol=1e-4, atol=1e-4)
