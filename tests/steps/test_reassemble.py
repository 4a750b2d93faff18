"""QLLM at work on a block: function kept where it must be, thresholds searched, channels where splitting wins."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.models.roles import SiteKind
from mergequant.nn import QuantLinear
from mergequant.ops import reassemble
from mergequant.pipeline.blocks import quantize_block
from mergequant.recipes import get_recipe
from mergequant.steps import LowRank, Reassemble, Round, TokenInput
from mergequant.steps.reassemble import thinned
from mergequant.transforms import ReassembledScheme, TokenScheme

Opener = Callable[..., BlockContext]


def site(context: BlockContext, kind: SiteKind = "norm") -> SiteContext:
    return context.site(next(site for site in context.structure.sites if site.kind == kind))


def output(context: BlockContext) -> Tensor:
    return context.chain.run(context.chain.hidden[1])


def strong(context: BlockContext) -> BlockContext:
    """Some channels with strong gains behind both norms, their weight columns as large as any."""
    with torch.no_grad():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            context.module.get_submodule(norm).weight[[2, 9, 30]] *= 10
    return context


def planted(context: BlockContext) -> BlockContext:
    """One channel 60 times as strong, a normal column behind it, and some channels that hardly carry anything."""
    with torch.no_grad():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            gain = context.module.get_submodule(norm).weight
            gain[7] *= 60
            gain[[4, 5, 12, 13, 16, 17, 24, 25, 28, 29, 32, 33]] *= 0.02
    return context


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "phi3"])
@pytest.mark.parametrize("kind", ["norm", "mlp_output"])
def test_reassemble_when_width_may_grow_expect_scheme_on_divided_channels_to_give_the_same_product(
    open_block: Opener, family: str, kind: SiteKind
) -> None:
    context = open_block(family)
    own, before = site(context, kind), output(context)
    target = own.sample("held_out", 64) @ own.stacked_weight().t()
    Reassemble(expansion=0.3, merge=False).run(own)
    scheme = own.scheme
    assert isinstance(scheme, ReassembledScheme)
    width = own.site.width
    assert scheme.merges == ()
    assert scheme.width in (width + int(0.3 * width), width + int(0.3 * width) + 1)
    assert scheme.width % 2 == 0
    kept = scheme.exact_values(own.sample("held_out", 64)) @ scheme.fold(own.stacked_weight()).t()
    torch.testing.assert_close(kept, target, rtol=1e-4, atol=1e-4 * float(target.abs().max()))
    torch.testing.assert_close(output(context), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_reassemble_when_searched_expect_constant_width_and_the_candidate_of_least_loss(open_block: Opener) -> None:
    context = strong(open_block())
    own = site(context)
    Reassemble().run(own)
    figures = context.figures[own.site.name]
    assert isinstance(own.scheme, ReassembledScheme)
    assert own.scheme.width == own.site.width
    assert 0 < figures["expansion"] <= 0.2
    assert figures["loss_share"] < 1
    step = Reassemble()
    again = site(strong(open_block()))
    losses = step._losses(again, step._candidates(again))
    assert min(losses, key=lambda threshold: losses[threshold]) == figures["threshold"]
    assert len(losses) == figures["candidates"] > 4
    few = site(strong(open_block()))
    Reassemble(tried=3).run(few)
    assert few.block.figures[own.site.name]["candidates"] == 3


@pytest.mark.parametrize(
    ("count", "places"), [(0, range(30)), (99, range(30)), (1, [0]), (2, [0, 29]), (5, [0, 2, 5, 12, 29])]
)
def test_thinned_when_fewer_are_asked_for_expect_them_dense_at_the_front(count: int, places: Iterable[int]) -> None:
    found = {float(number): torch.tensor([number]) for number in range(30)}
    assert list(thinned(found, count)) == [float(place) for place in places]


@pytest.mark.parametrize("expansion", [0.0, 0.5])
@pytest.mark.parametrize(("family", "kind"), [("opt_gelu_projected", "mlp_output"), ("llama", "attention_output")])
def test_reassemble_when_channels_cannot_be_divided_one_by_one_expect_token_scales_alone(
    open_block: Opener, family: str, kind: SiteKind, expansion: float
) -> None:
    """A GELU in front, or rows that feed two query heads."""
    own = site(open_block(family), kind)
    before = own.stacked_weight()
    Reassemble(expansion=expansion).run(own)
    assert own.scheme == TokenScheme(4)
    assert torch.equal(own.stacked_weight(), before)
    assert own.block.figures[own.site.name]["reassembled"] == 0


@pytest.mark.parametrize("kind", ["norm", "mlp_output"])
@pytest.mark.parametrize("merge", [True, False])
def test_round_when_channels_are_reassembled_expect_the_schemes_codes_and_its_product(
    open_block: Opener, kind: SiteKind, merge: bool
) -> None:
    own = site(strong(open_block()), kind)
    Reassemble(expansion=0.25, merge=merge).run(own)
    own.close()
    chunk = own.sample("held_out", 40)
    scheme = own.scheme
    assert isinstance(scheme, ReassembledScheme)
    values = scheme.values(chunk)
    Round(method="rtn", bits=4).run(own)
    linear = own.block.module.get_submodule(own.site.consumers[0])
    assert isinstance(linear, QuantLinear)
    assert linear.input_quantizer is not None
    source = linear.spec.input
    assert (source.kind, source.in_width, source.width) == ("dynamic", own.site.width, scheme.width)
    assert bool(source.merges) == merge
    codes, scale = linear.input_quantizer(chunk)
    assert scale is not None
    assert torch.equal(codes.float() * scale, values)
    slots = reassemble(chunk, scheme.index, scheme.merges)
    assert float((values - slots).abs().max() / slots.abs().max()) < 0.5 / 7 + 1e-6
    torch.testing.assert_close(linear(chunk), values @ linear.decoded_weight().t(), rtol=1e-4, atol=1e-4)


def block_error(context: BlockContext, name: str, **settings: object) -> float:
    """Squared error of the block's output on a held-out chunk, relative to what the block adds to its input."""
    hidden = context.chain.hidden[1]
    target = context.chain.run(hidden)
    quantize_block(context, get_recipe(name, **settings))
    return float((context.chain.run(hidden) - target).square().sum() / (target - hidden).square().sum())


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_qllm_when_strong_channels_meet_normal_columns_expect_splitting_to_win(
    open_block: Opener, activation_bits: int
) -> None:
    """Scaling makes columns as strong as the channel was; rounding alone stretches every token's step."""

    def error(name: str, **settings: object) -> float:
        bits = {"weight_bits": 4, "activation_bits": activation_bits}
        return block_error(planted(open_block(outlier=1)), name, **{**bits, **settings})

    split = error("qllm", correction="none", most=0.5)
    assert split < 0.7 * error("rtn")
    assert split < 0.7 * error("smoothquant", alpha=0.85)
    assert split < 0.9 * error("smoothquant")


def test_qllm_when_expansion_grows_expect_less_error_without_merging(open_block: Opener) -> None:
    errors = [
        block_error(strong(open_block()), "qllm", expansion=expansion, merge=False, correction="none")
        for expansion in (0.0, 0.1, 0.3)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("correction", ["apart", "merged", "inputs"])
def test_qllm_when_corrected_expect_training_error_to_fall_and_trained_norms_in_the_block(
    open_block: Opener, correction: str
) -> None:
    context = open_block()
    context.chain.shell.stored_dtype = torch.bfloat16
    told: list[str] = []
    context.progress = told.append
    before = {name: p.clone() for name, p in context.module.named_parameters() if "layernorm" in name}
    quantize_block(context, get_recipe("qllm", correction=correction, epochs=6, learning_rate=2e-3))
    figures = context.figures["block"]
    assert figures["low_rank_loss_last_epoch"] < figures["low_rank_loss_first_epoch"]
    assert len(told) == 6
    assert "epoch 6 of 6" in told[-1]
    for name, old in before.items():
        trained = context.module.get_parameter(name)
        assert not torch.equal(trained, old)
        assert torch.equal(trained.bfloat16().float(), trained)  # what the checkpoint can hold


def test_low_rank_when_rounding_is_apart_expect_the_corrections_own_rounding_left_out(open_block: Opener) -> None:
    """The loop's loss is that of Q(W) + AB; merged, the correction is rounded with the weight."""
    context = open_block()
    for each in context.structure.sites:
        TokenInput(search=False).run(context.site(each))
    LowRank(epochs=1, learning_rate=1e-12, round_weights=True, apart=True).run(context)
    start = context.figures["block"]["low_rank_loss_first_epoch"]
    other = open_block()
    for each in other.structure.sites:
        TokenInput(search=False).run(other.site(each))
    LowRank(epochs=1, learning_rate=1e-12, round_weights=True).run(other)
    assert start == pytest.approx(other.figures["block"]["low_rank_loss_first_epoch"], rel=1e-3)


def test_steps_when_settings_contradict_expect_refused() -> None:
    with pytest.raises(RecipeError, match=r"between 0 and 0\.5"):
        Reassemble(most=0.6)
    with pytest.raises(RecipeError, match="chunks 0"):
        Reassemble(chunks=0)
    with pytest.raises(RecipeError, match="round_weights"):
        LowRank(apart=True)
