"""What the MergeQuant digest says must hold on a single synthetic layer with planted outliers."""

import pytest
import torch
from torch import Tensor

from mergequant.grids import ClipSearch, IntegerGrid, Quantizer
from mergequant.solvers import GramSum, gptq, rtn
from mergequant.transforms import (
    ChannelScheme,
    InputScheme,
    TensorScheme,
    TokenScheme,
    channel_clip_ratios,
    split_channels,
    split_counts,
)

WIDTH, OUTPUTS = 384, 64
WEIGHTS = Quantizer(IntegerGrid(4), None, ClipSearch(norm=2.4))


def layer(seed: int, outliers: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Calibration tokens, fresh test tokens and a weight: correlated, RMS-normalized, a few channels at 15-20x.

    (At 50x a scale per token and plain QSM lose the same: the one drowns weak channels, the other their weights.)
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(96, WIDTH, generator=generator) / 96**0.5
    x = torch.randn(3000, 96, generator=generator) @ mix + 0.5 * torch.randn(3000, WIDTH, generator=generator)
    x /= x.square().mean(1, keepdim=True).sqrt()
    x[:, torch.randperm(WIDTH, generator=generator)[:outliers]] *= torch.linspace(15, 20, outliers)
    weight = torch.randn(OUTPUTS, WIDTH, generator=generator) / WIDTH**0.5
    return x[:2000], x[2000:], weight


def solve(scheme: InputScheme, calibration: Tensor, weight: Tensor, method: str) -> Tensor:
    folded = scheme.fold(weight)
    if method == "rtn":
        return rtn(folded, WEIGHTS).quantized.decode()
    gram = GramSum.zeros(folded.shape[1], folded.shape[1], weight.device)
    gram.add(scheme.values(calibration))
    return gptq(folded, gram.total, WEIGHTS).quantized.decode()


def relative_error(scheme: InputScheme, rounded: Tensor, test: Tensor, weight: Tensor) -> float:
    target = test @ weight.t()
    return float((scheme.values(test) @ rounded.t() - target).square().sum() / target.square().sum())


def qsm(calibration: Tensor) -> ChannelScheme:
    return ChannelScheme.plain(calibration.abs().amax(0) / 7, 4)


def split(scheme: ChannelScheme, weight: Tensor, share: float, stagger: bool) -> ChannelScheme:
    copies = split_counts(scheme.fold(weight).abs().amax(0), int(share * WIDTH))
    return split_channels(scheme.step, copies, 4, stagger=stagger)


def clip(scheme: ChannelScheme, calibration: Tensor, weight: Tensor) -> ChannelScheme:
    """Ratios^lambda with the lambda of least output error on calibration tokens that GPTQ did not see."""
    fit, judge = calibration[:1500], calibration[1500:]
    copies = torch.bincount(scheme.index)
    ratios = channel_clip_ratios(fit, scheme.step, copies, 4, stagger=True, norm=2.4, least=0.4, steps=25)
    candidates = [
        ChannelScheme(4, scheme.step * ratios**power, scheme.index, scheme.share, scheme.offset)
        for power in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return min(candidates, key=lambda c: relative_error(c, solve(c, fit, weight, "gptq"), judge, weight))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layer_error_when_ingredients_are_added_expect_the_papers_order(seed: int) -> None:
    calibration, test, weight = layer(seed)
    plain = qsm(calibration)
    faithful, staggered = split(plain, weight, 0.1, False), split(plain, weight, 0.1, True)
    clipped = clip(staggered, calibration, weight)

    def error(scheme: InputScheme, method: str = "gptq") -> float:
        return relative_error(scheme, solve(scheme, calibration, weight, method), test, weight)

    per_token, qsm_rtn, qsm_gptq = error(TokenScheme(4), "rtn"), error(plain, "rtn"), error(plain)
    with_split, with_stagger, with_clip = error(faithful), error(staggered), error(clipped)
    only_weights = relative_error_of_weights(calibration, test, weight)
    assert per_token > qsm_rtn
    assert qsm_rtn > 1.3 * qsm_gptq  # the digest's ">>" is between a scale per token and this
    assert qsm_gptq > 2 * with_split  # strong channels, ordinary weight columns: at least twofold
    assert with_split > 2 * with_stagger
    assert with_clip <= with_stagger * 1.02
    assert with_clip > only_weights  # the floor: weights alone


def relative_error_of_weights(calibration: Tensor, test: Tensor, weight: Tensor) -> float:
    gram = calibration.double().t() @ calibration.double()
    rounded = gptq(weight, gram, WEIGHTS).quantized.decode()
    target = test @ weight.t()
    return float((test @ rounded.t() - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("ingredient", ["plain", "split", "stagger", "clip"])
def test_qsm_when_channels_trade_scale_with_weights_expect_the_same_codes(method: str, ingredient: str) -> None:
    calibration, test, weight = layer(3)
    # A power of two in place of 50, so that float32 itself loses nothing and equality can be exact.
    factor = torch.ones(WIDTH)
    factor[::5], factor[1::7] = 64.0, 1 / 32

    def build(x: Tensor, w: Tensor) -> ChannelScheme:
        scheme = qsm(x)
        if ingredient == "plain":
            return scheme
        scheme = split(scheme, w, 0.1, ingredient != "split")
        return clip(scheme, x, w) if ingredient == "clip" else scheme

    first, second = build(calibration, weight), build(calibration * factor, weight / factor)
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.values(test), second.values(test * factor))
    assert torch.equal(
        solve(first, calibration, weight, method), solve(second, calibration * factor, weight / factor, method)
    )
    assert first.values(test).unique().numel() == 16


def test_qsm_when_factor_is_50_expect_nearly_same_output_where_shared_steps_collapse() -> None:
    calibration, test, weight = layer(4, outliers=0)
    factor = torch.ones(WIDTH)
    factor[:3] = 50.0

    def error(kind: str, scale: Tensor) -> float:
        x, t, w = calibration * scale, test * scale, weight / scale
        schemes: dict[str, InputScheme] = {
            "qsm": qsm(x),
            "token": TokenScheme(4),
            "tensor": TensorScheme(4, float(x.abs().max()) / 7),
        }
        return relative_error(schemes[kind], solve(schemes[kind], x, w, "rtn"), t, w)

    ones = torch.ones(WIDTH)
    assert error("qsm", factor) == pytest.approx(error("qsm", ones), rel=1e-2)
    assert error("token", factor) > 2 * error("token", ones)
    assert error("tensor", factor) > 1.5 * error("tensor", ones)
