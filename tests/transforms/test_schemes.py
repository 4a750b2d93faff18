"""Input schemes: the identity that all of them keep, and what they round."""

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.transforms import ChannelScheme, FloatScheme, InputScheme, TensorScheme, TokenScheme, split_channels

CHANNELS = 30


def inputs(seed: int = 0) -> Tensor:
    """Float64 tokens whose channels differ by orders of magnitude, channel 4 dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, CHANNELS, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-2, 2, CHANNELS, dtype=torch.float64)
    x[:, 4] = 0
    return x


def channel_scheme(bits: int = 4, stagger: bool = False, dtype: torch.dtype = torch.float64) -> ChannelScheme:
    step = (inputs().abs().amax(0) / 7).to(dtype)
    copies = torch.ones(CHANNELS, dtype=torch.int64)
    copies[[0, 7, 29]] = torch.tensor([2, 3, 7])
    return split_channels(step, copies, bits, stagger=stagger)


SCHEMES: dict[str, InputScheme] = {
    "float": FloatScheme(),
    "token": TokenScheme(4, 0.9),
    "tensor": TensorScheme(4, 0.37),
    "channel": ChannelScheme.plain(inputs().abs().amax(0) / 7, 4),
    "split": channel_scheme(),
    "stagger": channel_scheme(stagger=True),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_when_nothing_is_rounded_expect_the_product_kept_exactly(name: str) -> None:
    scheme, x = SCHEMES[name], inputs()
    weight = torch.randn(13, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = x @ weight.t()
    kept = scheme.exact_values(x) @ scheme.fold(weight).t()
    assert float((kept - target).abs().max() / target.abs().max()) < 1e-10


@pytest.mark.parametrize(("name", "most"), [("token", 0.9), ("tensor", 0.99), ("channel", 0.02), ("stagger", 0.02)])
def test_scheme_when_rounded_expect_product_near_and_codes_on_the_grid(name: str, most: float) -> None:
    scheme, x = SCHEMES[name], inputs().float()
    weight = torch.randn(13, CHANNELS, generator=torch.Generator().manual_seed(1))
    target = x @ weight.t()
    values = scheme.values(x)
    assert values.dtype == torch.float32
    error = float((values @ scheme.fold(weight).t() - target).square().sum() / target.square().sum())
    assert 0 < error < most
    if name != "token":
        assert torch.equal(values, values.round())
        assert (float(values.min()), float(values.max())) in {(-7.0, 7.0), (-8.0, 7.0)}


def test_offsets_when_staggered_expect_them_to_average_to_zero_per_channel_and_shares_to_one() -> None:
    scheme = channel_scheme(stagger=True)
    total = torch.zeros(CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(total.index_add(0, scheme.index, scheme.offset), total, rtol=0, atol=1e-12)
    shares = total.index_add(0, scheme.index, scheme.share)
    torch.testing.assert_close(shares, torch.ones(CHANNELS, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(scheme.offset.abs().max()) > 0.3
    assert float(scheme.offset.abs().max()) < 0.5


def test_dead_channel_when_folded_expect_zero_multiplier_code_and_weight() -> None:
    scheme = channel_scheme()
    slot = int((scheme.index == 4).nonzero())
    assert float(scheme.multiplier[slot]) == 0
    assert bool(torch.isfinite(scheme.multiplier).all())
    assert not scheme.fold(torch.ones(3, CHANNELS, dtype=torch.float64))[:, slot].any()
    noisy = inputs()
    noisy[:, 4] = 1e9
    assert not scheme.values(noisy)[:, slot].any()


def test_channel_values_when_compared_with_the_run_time_op_expect_equal_codes() -> None:
    scheme, x = channel_scheme(stagger=True, dtype=torch.float32), inputs().float()
    codes = ops.static_quant(x, scheme.multiplier, scheme.index.to(torch.int32), scheme.offset, scheme.bits)
    assert torch.equal(scheme.values(x), codes.float())


def test_tensor_values_when_compared_with_the_run_time_op_expect_equal_codes_even_at_ties() -> None:
    scheme = TensorScheme(8, 0.1)
    x = (torch.arange(-1280, 1280).float() / 20).reshape(1, -1) * 0.1  # half of all values are ties before rounding
    multiplier = torch.tensor([1 / scheme.step])
    assert torch.equal(scheme.values(x), ops.static_quant(x, multiplier, None, None, 8).float())


def test_token_values_when_a_token_is_scaled_expect_values_to_scale() -> None:
    x = inputs().float()
    scheme = TokenScheme(4)
    torch.testing.assert_close(scheme.values(x * 8), scheme.values(x) * 8, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["token", "tensor", "split", "stagger"])
def test_clamped_when_counted_expect_the_share_of_codes_beyond_the_grid(name: str) -> None:
    scheme, x = SCHEMES[name], inputs() * 1.5
    if isinstance(scheme, TokenScheme):
        scheme = TokenScheme(4, 0.5)
        unrounded = x / (x.abs().amax(1, keepdim=True) * 0.5 / 7)
    elif isinstance(scheme, ChannelScheme):
        unrounded = scheme.exact_values(x) + scheme.offset
    else:
        unrounded = scheme.exact_values(x)
    beyond = (unrounded.round() > 7) | (unrounded.round() < -8)
    assert 0 < float(beyond.double().mean()) < 1
    assert scheme.clamped(x) == pytest.approx(float(beyond.double().mean()), abs=1e-6)


def test_keep_when_given_mask_or_positions_expect_those_slots() -> None:
    scheme = channel_scheme(stagger=True)
    mask = torch.ones(scheme.width, dtype=torch.bool)
    mask[[3, 8]] = False
    by_mask, by_position = scheme.keep(mask), scheme.keep(mask.nonzero().flatten())
    for kept in (by_mask, by_position):
        assert kept.width == scheme.width - 2
        for field in ("index", "share", "offset"):
            assert torch.equal(getattr(kept, field), getattr(scheme, field)[mask])


def test_is_plain_when_channels_are_split_or_dropped_expect_false() -> None:
    plain = ChannelScheme.plain(torch.ones(6), 4)
    assert plain.is_plain
    assert not plain.keep(torch.tensor([0, 1, 2, 3, 4])).is_plain
    assert not plain.keep(torch.tensor([1, 0, 2, 3, 4, 5])).is_plain
    assert not channel_scheme().is_plain
