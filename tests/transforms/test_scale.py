"""Channel scales by their formulas, and the clip search against trying every range by hand."""

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import AbsMax, IntegerGrid, Quantizer
from mergequant.transforms import activation_aware_scale, clip_groups, smoothing_scale


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_smoothing_scale_when_alpha_is_half_expect_inputs_and_columns_equally_hard() -> None:
    inputs, weights = normal(9).exp(), normal(9, seed=1).exp()
    scale = smoothing_scale(inputs, weights, 0.5)
    torch.testing.assert_close(inputs / scale, weights * scale)
    torch.testing.assert_close(scale, (inputs / weights).sqrt())


def test_smoothing_scale_when_alpha_is_at_its_ends_expect_one_side_evened_out() -> None:
    inputs, weights = normal(9).exp(), normal(9, seed=1).exp()
    torch.testing.assert_close(inputs / smoothing_scale(inputs, weights, 1.0), torch.ones(9))
    torch.testing.assert_close(weights * smoothing_scale(inputs, weights, 0.0), torch.ones(9))


def test_smoothing_scale_when_channels_are_dead_expect_positive_and_finite() -> None:
    inputs, weights = torch.tensor([0.0, 0.0, 2.0, 1e-30]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    for alpha in (0.0, 0.5, 1.0):
        scale = smoothing_scale(inputs, weights, alpha)
        assert scale.isfinite().all()
        assert float(scale.min()) >= 0.99e-5
        assert scale[:2].tolist() == [1, 1]


def test_activation_aware_scale_when_ratio_is_zero_expect_exactly_one() -> None:
    inputs = torch.cat([normal(9).exp(), torch.zeros(1)])
    assert torch.equal(activation_aware_scale(inputs, 0.0), torch.ones(10))


def test_activation_aware_scale_expect_the_power_centred_in_its_range() -> None:
    inputs = normal(9).exp()
    scale = activation_aware_scale(inputs, 0.6)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(scale / scale[0], (inputs / inputs[0]) ** 0.6)
    assert torch.equal(activation_aware_scale(torch.ones(5), 0.7), torch.ones(5))  # even inputs: nothing to win


@pytest.mark.parametrize("group", [None, 4])
def test_clip_groups_when_compared_with_every_share_by_hand_expect_the_best(group: int | None) -> None:
    weight, x = normal(6, 12) ** 3, normal(50, 12, seed=1) * torch.linspace(0.2, 3, 12)
    quantizer = Quantizer(IntegerGrid(3), group, AbsMax())
    clipped = clip_groups(weight, x.t() @ x, quantizer, least=0.55, steps=10)
    size = group or 12
    for row in range(6):
        for start in range(0, 12, size):
            columns = slice(start, start + size)
            own, losses = weight[row : row + 1, columns], []
            for i in range(10):
                bound = float(own.abs().max()) * (1 - i / 20)
                rounded = Quantizer(IntegerGrid(3)).encode(own.clamp(-bound, bound)).decode()
                losses.append(float(((rounded - own) @ x[:, columns].t()).square().sum()))
            rounded = Quantizer(IntegerGrid(3)).encode(clipped[row : row + 1, columns]).decode()
            found = float(((rounded - own) @ x[:, columns].t()).square().sum())
            assert found == pytest.approx(min(losses), rel=1e-3)
    assert not torch.equal(clipped, weight)


def test_clip_groups_when_only_the_whole_range_is_tried_expect_the_weight_itself() -> None:
    weight = normal(6, 12)
    quantizer = Quantizer(IntegerGrid(4), 4, AbsMax())
    assert torch.equal(clip_groups(weight, torch.eye(12), quantizer, least=0.5, steps=1), weight)


def test_clip_groups_when_group_does_not_divide_expect_error() -> None:
    with pytest.raises(UsageError, match="group size 5 does not divide"):
        clip_groups(normal(6, 12), torch.eye(12), Quantizer(IntegerGrid(4), 5), least=0.5, steps=3)
