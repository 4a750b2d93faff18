"""Channel shifts and the threshold scale by their formulas."""

import torch

from mergequant.transforms import middles, threshold_scale, without_small


def test_middles_expect_half_way_between_the_ends_of_every_window() -> None:
    windows = torch.tensor([[[30.0, -1.0], [50.0, 3.0]], [[0.0, 0.0], [1.0, -5.0]]])
    assert middles(windows).tolist() == [[40.0, 1.0], [0.5, -2.5]]


def test_without_small_expect_magnitudes_compared() -> None:
    shift = torch.tensor([-10.0, 4.0, -6.0, 0.1])
    assert without_small(shift, 0.5).tolist() == [-10.0, 0.0, -6.0, 0.0]
    assert torch.equal(without_small(shift, 0.0), shift)
    assert torch.equal(without_small(torch.zeros(3), 0.5), torch.zeros(3))


def test_threshold_scale_expect_channels_above_it_brought_down_and_others_untouched() -> None:
    inputs = torch.tensor([1.0, 40.0, 100.0, 0.0])
    scale = threshold_scale(inputs, 0.2)
    torch.testing.assert_close(inputs / scale, torch.tensor([1.0, 20.0, 20.0, 0.0]))
    assert scale[[0, 3]].tolist() == [1.0, 1.0]
    assert torch.equal(threshold_scale(inputs, 1.0), torch.ones(4))
    assert threshold_scale(torch.zeros(4), 0.5).tolist() == [1.0] * 4
