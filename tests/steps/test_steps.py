"""Steps at work on a block of a small model: what they decide, what they put in place, what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.models.roles import SiteKind
from mergequant.nn import QuantLinear, QuantNorm
from mergequant.pipeline.blocks import quantize_block
from mergequant.recipes import get_recipe
from mergequant.steps import (
    Clip,
    Compensate,
    Judge,
    LowRank,
    Prune,
    Ranges,
    Rotate,
    Round,
    Split,
    Step,
    TensorInput,
    TokenInput,
)
from mergequant.transforms import ChannelScheme, FloatScheme, TensorScheme, TokenScheme

Opener = Callable[..., BlockContext]


def site(context: BlockContext, kind: SiteKind = "norm", position: int = 0) -> SiteContext:
    return context.site([site for site in context.structure.sites if site.kind == kind][position])


def act(own: SiteContext, *steps: Step) -> SiteContext:
    for step in steps:
        step.run(own)  # type: ignore[attr-defined]
    return own


def channels(own: SiteContext) -> ChannelScheme:
    assert isinstance(own.scheme, ChannelScheme)
    return own.scheme


def test_ranges_when_largest_magnitude_expect_no_code_beyond_the_grid(open_block: Opener) -> None:
    own = act(site(open_block()), Ranges())
    inputs = torch.cat(list(own.chunks()))
    torch.testing.assert_close(channels(own).step, inputs.abs().amax(0) / 7)
    assert channels(own).clamped(inputs) == 0
    narrower = act(site(open_block()), Ranges(quantile=0.9))
    assert 0.03 < channels(narrower).clamped(inputs) < 0.11


def test_ranges_when_a_channel_is_dead_expect_step_zero_and_report(open_block: Opener) -> None:
    context = open_block()
    with torch.no_grad():
        context.module.input_layernorm.weight[5] = 0
    own = act(site(context), Ranges())
    assert float(channels(own).step[5]) == 0
    assert context.figures[own.site.name]["dead_channels"] == 1


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.26])
def test_split_when_budget_is_given_expect_even_width_and_strong_channels_in_copies(
    open_block: Opener, tile: int, budget: float
) -> None:
    own = act(site(open_block()), Ranges(), Split(budgets=(budget,), tile=tile, stagger=True))
    scheme = channels(own)
    extra = -(-int(budget * 40 + 0.999) // tile) * tile if tile else int(budget * 40)
    assert scheme.width == 40 + extra + extra % 2
    copies = torch.bincount(scheme.index, minlength=40)
    strength = own.stacked_weight().abs().amax(0) * scheme.step
    assert int(copies.min()) == 1
    if budget:
        assert int(copies[strength.argmax()]) == int(copies.max()) > 1
    own_figures = own.block.figures[own.site.name]
    assert own_figures["most_copies"] == float(copies.max())


def test_split_when_several_budgets_expect_the_one_of_least_joint_loss(open_block: Opener) -> None:
    budgets = (0.0, 0.1, 0.3)
    losses = {}
    for budget in budgets:
        own = act(site(open_block()), Ranges(), Split(budgets=(budget,)))
        losses[budget] = Judge().relative_error(own, own.scheme)
    chosen = act(site(open_block()), Ranges(), Split(budgets=budgets))
    best = min(losses, key=lambda budget: losses[budget])
    assert chosen.block.figures[chosen.site.name]["split_budget"] == best
    assert best > 0  # outliers are there, so splitting pays


def test_prune_when_channels_were_split_expect_old_width_and_no_copy_lost(open_block: Opener) -> None:
    own = act(site(open_block()), Ranges(), Split(budgets=(0.2,)))
    before = torch.bincount(channels(own).index, minlength=40)
    act(own, Prune())
    after = torch.bincount(channels(own).index, minlength=40)
    assert channels(own).width == 40
    assert torch.equal(after[before > 1], before[before > 1])
    assert int((after == 0).sum()) == 8


def test_prune_when_nothing_is_left_unsplit_expect_error_that_names_the_site(open_block: Opener) -> None:
    own = act(site(open_block()), Ranges(), Split(budgets=(1.0,)))
    with pytest.raises(RecipeError, match=r"layers\.0\.input_layernorm.*are not split"):
        act(own, Prune())


@pytest.mark.parametrize("step", [Split(), Clip(), Prune()], ids=lambda step: step.name)
def test_channel_steps_when_ranges_are_missing_expect_error_that_says_so(open_block: Opener, step: Step) -> None:
    with pytest.raises(RecipeError, match="put the step 'ranges' before it"):
        act(site(open_block()), step)


@pytest.mark.parametrize("kind", ["norm", "attention_output", "mlp_output"])
@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_clip_when_joint_expect_never_more_joint_loss_than_without(
    open_block: Opener, kind: SiteKind, rounding: str
) -> None:
    judge = Judge(rounding)  # type: ignore[arg-type]
    own = act(site(open_block(), kind), Ranges())
    before, steps = judge.relative_error(own, own.scheme), channels(own).step
    act(own, Clip(rounding=rounding))  # type: ignore[arg-type]
    assert judge.relative_error(own, own.scheme) <= before
    assert bool((channels(own).step <= steps).all())
    assert bool((channels(own).step >= 0.399 * steps).all())


def test_clip_when_mode_is_none_or_activation_expect_untouched_or_clipped_whatever_the_weights(
    open_block: Opener,
) -> None:
    own = act(site(open_block()), Ranges())
    before = own.scheme
    act(own, Clip(mode="none"))
    assert own.scheme is before
    act(own, Clip(mode="activation"))
    assert float(channels(own).step.sum()) < float(before.step.sum())


@pytest.mark.parametrize("step", [Ranges(("attention_output",)), Clip(("attention_output",))], ids=lambda s: s.name)
def test_tied_channels_when_heads_share_a_value_row_expect_one_step_per_row(open_block: Opener, step: Step) -> None:
    own = act(site(open_block(), "attention_output"), Ranges(), step)
    assert own.site.producer is not None
    rows = torch.tensor(own.site.producer.channel)
    assert rows.unique().numel() == 20  # 4 heads share the values of 2
    for row in rows.unique():
        assert channels(own).step[rows == row].unique().numel() == 1


def codes_and_values(own: SiteContext, number: int = 1) -> tuple[Tensor, Tensor]:
    """Codes that a quantized norm emits for a chunk, and what the scheme says they should be."""
    assert own.site.norm is not None
    hidden = own.block.chain.hidden[number]
    own.close()
    inputs = list(own.block.capture(own.site))  # float: the norm is not replaced yet
    expected = own.scheme.values(inputs[number])
    Round().run(own)
    norm = own.block.module.get_submodule(own.site.norm.name)
    assert isinstance(norm, QuantNorm)
    return norm(hidden).reshape(expected.shape), expected


@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
@pytest.mark.parametrize("stagger", [False, True])
def test_round_when_step_migrates_into_a_norm_expect_its_codes_to_be_the_schemes(
    open_block: Opener, family: str, stagger: bool
) -> None:
    own = act(site(open_block(family)), Ranges(), Split(budgets=(0.2,), stagger=stagger), Prune())
    codes, expected = codes_and_values(own)
    assert codes.dtype == torch.int8
    assert codes.unique().numel() >= 14
    different = codes.float() != expected
    assert float(different.float().mean()) < 1e-3  # ties: gain and step are multiplied in another order
    assert float((codes.float() - expected).abs().max()) <= 1


@pytest.mark.parametrize("kind", ["attention_output", "mlp_output"])
@pytest.mark.parametrize("how", ["token", "tensor", "channel", "rotated_token", "rotated_tensor"])
def test_round_when_a_linear_is_replaced_expect_codes_of_the_scheme_and_one_epilogue(
    open_block: Opener, kind: SiteKind, how: str
) -> None:
    own = site(open_block("opt") if how == "channel" and kind == "mlp_output" else open_block(), kind)
    if how.startswith("rotated"):
        act(own, Rotate())
    steps: dict[str, list[Step]] = {"token": [TokenInput()], "tensor": [TensorInput()], "channel": [Ranges(bits=8)]}
    act(own, *steps[how.removeprefix("rotated_")])
    plain = torch.cat(list(own.block.capture(own.site)))
    chunk = torch.cat([*own.chunks(), *own.chunks("held_out")])
    values = own.scheme.values(chunk)
    act(own, Round())
    linear = own.block.module.get_submodule(own.site.consumers[0])
    assert isinstance(linear, QuantLinear)
    assert linear.input_quantizer is not None
    absorbed = how == "channel" and own.site.producer is not None
    if absorbed:
        plain = plain * channels(own).multiplier  # what arrives once the producer has absorbed 1 / step
    codes, scale = linear.input_quantizer(plain)
    if how.endswith("token"):
        assert scale is not None
        assert torch.equal(codes.float() * scale, values)
    else:
        assert scale is None
        assert float((codes.float() != values).float().mean()) < (1e-3 if absorbed else 1e-9)
    assert codes.unique().numel() >= 14
    assert torch.equal(linear.decoded_weight(), own.solutions[own.site.consumers[0]].quantized.decode())
    fake = values.double() @ linear.decoded_weight().double().t()
    if linear.bias is not None:
        fake = fake + linear.bias.double()
    torch.testing.assert_close(linear(plain).double(), fake, rtol=1e-4, atol=1e-4 * float(fake.abs().max()))


def test_round_when_groups_meet_quantized_inputs_expect_refused(open_block: Opener) -> None:
    own = act(site(open_block()), Ranges())
    with pytest.raises(RecipeError, match=r"layers\.0\.input_layernorm: groups of 8.*group_size=0"):
        act(own, Round(group_size=8))
    act(site(open_block()), Round(group_size=8))  # float inputs take them


def test_round_when_gptq_expect_less_output_error_than_rtn(open_block: Opener) -> None:
    errors = {}
    for method in ("gptq", "rtn"):
        own = act(site(open_block()), Ranges(), Round(method=method))  # type: ignore[arg-type]
        errors[method] = own.block.figures[own.site.name]["output_error"]
    assert 0 < errors["gptq"] < errors["rtn"]


def test_compensate_when_channels_were_clipped_and_dropped_expect_less_output_error(open_block: Opener) -> None:
    errors = []
    for steps in ([], [Compensate()]):
        own = act(site(open_block()), Ranges(quantile=0.9), Split(budgets=(0.3,)), Prune(), *steps, Round(bits=8))
        errors.append(own.block.figures[own.site.name]["output_error"])
    assert errors[1] < errors[0]


def test_token_input_when_searched_expect_ratio_within_bounds_and_no_worse_than_one(open_block: Opener) -> None:
    own = act(site(open_block(), "mlp_output"), TokenInput(trim=0))
    assert isinstance(own.scheme, TokenScheme)
    assert 0.51 <= own.scheme.clip_ratio <= 1
    sample, weight = own.sample("calibration", 1024), own.stacked_weight()

    def loss(scheme: TokenScheme) -> float:
        return float(((scheme.values(sample) - sample) @ weight.t()).abs().pow(2.4).sum())

    assert loss(own.scheme) <= loss(TokenScheme(4, 1.0)) * (1 + 1e-6)
    assert act(site(open_block(), "mlp_output"), TokenInput(search=False, clip_ratio=0.8)).scheme == TokenScheme(4, 0.8)


def test_tensor_input_when_searched_expect_least_output_error_among_steps(open_block: Opener) -> None:
    own = act(site(open_block(), "mlp_output"), TensorInput())
    assert isinstance(own.scheme, TensorScheme)
    sample, weight = own.sample("calibration", 2048), own.stacked_weight()

    def loss(step: float) -> float:
        error = TensorScheme(4, step).values(sample) * step - sample
        return float((error @ weight.t()).square().sum())

    largest = max(float(chunk.abs().max()) for chunk in own.chunks()) / 7
    assert loss(own.scheme.step) < loss(largest)
    assert loss(own.scheme.step) <= min(loss(largest * 0.02 ** (i / 9)) for i in range(10)) * 1.1
    assert own.scheme.step <= largest


def test_rotate_when_used_expect_quantized_linear_to_rotate_online(open_block: Opener) -> None:
    own = act(site(open_block(), "mlp_output"), Rotate(), TokenInput(bits=8), Round(bits=8))
    linear = own.block.module.get_submodule(own.site.consumers[0])
    assert isinstance(linear, QuantLinear)
    assert linear.spec.input.rotation == ops.rotation(52).name
    assert own.block.figures[own.site.name]["output_error"] < 1e-3


@pytest.mark.parametrize("scheme", [FloatScheme(), TokenScheme(4)])
def test_judge_when_scheme_is_float_expect_only_the_weights_error(
    open_block: Opener, scheme: FloatScheme | TokenScheme
) -> None:
    own = site(open_block())
    fine, coarse = Judge("rtn", 8).relative_error(own, scheme), Judge("rtn", 3).relative_error(own, scheme)
    assert 0 < fine < coarse
    if isinstance(scheme, FloatScheme):
        assert fine < 1e-3


@pytest.mark.parametrize("prefix", [None, ([1], True)], ids=["plain", "prefix"])
@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("mergequant", {"weight_bits": 8, "activation_bits": 8, "other_bits": 8, "split": 0.0}, 1e-3),
        ("mergequant", {"weight_bits": 8, "activation_bits": 8, "other": "static", "other_bits": 8}, 1e-3),
        ("mergequant", {"weight_bits": 8, "activation_bits": 8, "other": "hadamard", "other_bits": 8}, 1e-3),
        ("mergequant", {"compensation": "low_rank"}, 0.2),
    ],
)
def test_quantize_block_when_bits_are_many_expect_the_float_blocks_output(
    open_block: Opener, prefix: tuple[list[int], bool] | None, name: str, settings: dict[str, object], most: float
) -> None:
    context = open_block(prefix=prefix)
    hidden = context.chain.hidden[1]
    target = context.chain.run(hidden)
    quantize_block(context, get_recipe(name, **{"allow_no_prefix": True, **settings}))
    added = context.chain.run(hidden) - target
    assert 0 < float(added.square().sum() / (target - hidden).square().sum()) < most
    assert not [m for m in context.module.modules() if isinstance(m, torch.nn.Linear)]


def test_low_rank_when_trained_expect_block_error_to_fall_and_targets_for_every_linear(open_block: Opener) -> None:
    context = open_block()
    for own in (context.site(each) for each in context.structure.sites):
        act(own, Ranges() if own.site.kind == "norm" else TokenInput(search=False))
    before = {name: p.clone() for name, p in context.module.named_parameters()}
    LowRank(epochs=4).run(context)
    figures = context.figures["block"]
    assert figures["low_rank_loss_last_epoch"] < figures["low_rank_loss_first_epoch"]
    assert all(torch.equal(p, before[name]) for name, p in context.module.named_parameters())  # a copy was trained
    for own in context.sites.values():
        assert own.targets is not None
        for name, target in own.targets.items():
            folded = own.scheme.fold(own.weights[name])
            assert target.shape == folded.shape
            assert not target.requires_grad
            rank = int(
                torch.linalg.matrix_rank(((target - folded) / folded.square().mean(1, keepdim=True).sqrt()), atol=1e-4)
            )
            assert 1 <= rank <= 4
