"""Two-level integers: the protective range, both ways between codes and the middle level, errors, and size."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergequant.errors import KernelError, UsageError
from mergequant.grids import IntegerGrid, Quantizer, TwoLevelQuantizer, TwoLevelTensor
from mergequant.grids.two_level import LARGEST_STEP, PROTECTED, fine_codes, middle_codes

FINE = IntegerGrid(4)


def rows(count: int = 12, width: int = 32, seed: int = 0) -> Tensor:
    """Heavy-tailed rows of very different size; a row of zeros, one without negative values, one of a single value."""
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).pow(3)
    values *= torch.logspace(-6, 4, count)[:, None]
    values[0], values[1], values[2] = 0, values[1].abs(), 7.5
    return values


def reach(bound: int) -> tuple[int, int]:
    """Extreme middle values over all ranges of codes up to `bound`, steps that cover the range, in plain integers."""
    lowest = highest = 0
    for low, high in itertools.product(range(-bound, 1), range(bound + 1)):
        step = max(-(-(high - low) // 15), 1)
        zero = min(max(round(-8 - low / step), -8), 7)
        ends = [min(max(round(value / step + zero), -8), 7) for value in (low, high)]
        lowest, highest = min(lowest, (ends[0] - zero) * step), max(highest, (ends[1] - zero) * step)
    return lowest, highest


def test_middle_when_first_level_is_protected_expect_int8_for_every_range_of_codes() -> None:
    lowest, highest = reach(PROTECTED)
    assert -128 <= lowest < highest <= 127
    assert reach(127)[1] > 127  # what the protective range is for


@given(st.integers(0, 10_000), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_encode_when_any_codes_expect_middle_near_first_level(seed: int, spread: int, search: bool) -> None:
    """First-level codes of all sizes, and beyond a covering step never further away than half of it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-PROTECTED, PROTECTED + 1, (6, 24), generator=generator) // spread
    codes[:, 0] = PROTECTED  # so that the row's scale is 1
    made = TwoLevelQuantizer(8, search).encode(codes.float())
    assert torch.equal(made.scale, torch.ones(6, 1))
    middle = made.middle()  # raises where int8 does not hold it
    assert int(made.group_scale.min()) >= 1
    assert int(made.group_scale.max()) <= LARGEST_STEP
    assert torch.equal(fine_codes(middle, made.group_scale, made.group_zero), made.codes)
    assert torch.equal(made.decode(), middle.float())
    if not search:
        error = (middle.float() - codes).abs().reshape(6, 3, 8).amax(-1)
        assert bool((error <= made.group_scale.float()).all())  # half a step, and as much for the zero's rounding


def test_encode_when_step_is_searched_expect_less_error_in_every_group() -> None:
    values = rows()
    errors = [
        ((TwoLevelQuantizer(8, search).encode(values).decode() - values).square().reshape(12, 4, 8).sum(-1))
        for search in (False, True)
    ]
    slack = 1e-3 * errors[0]  # the search looks at first-level codes, not at the weights themselves
    assert bool((errors[1] <= errors[0] + slack).all())
    assert float(errors[1].sum()) < 0.95 * float(errors[0].sum())


def test_encode_when_weights_are_normal_expect_error_near_float_scales() -> None:
    """Integer steps cost little beside a float scale and zero per group, which this asymmetric reference has."""
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    grouped = values.reshape(64, -1, 128)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((grouped - low) / step).round() * step + low - grouped).square().sum()
    covering = (TwoLevelQuantizer(128, search=False).encode(values).decode() - values).square().sum()
    searched = (TwoLevelQuantizer(128).encode(values).decode() - values).square().sum()
    symmetric = (Quantizer(FINE, 128).encode(values).decode() - values).square().sum()
    assert float(covering) < 1.25 * float(plain)
    assert float(searched) < 1.01 * float(plain)
    assert float(searched) < float(symmetric)


def test_encode_when_rows_are_degenerate_expect_exact_zeros_and_single_values() -> None:
    made = TwoLevelQuantizer(8).encode(rows())
    decoded = made.decode()
    assert not decoded[0].any()
    torch.testing.assert_close(decoded[2], rows()[2], rtol=0.07, atol=0)
    assert decoded.isfinite().all()


def test_rows_when_cut_expect_the_same_values_and_bits() -> None:
    made = TwoLevelQuantizer(8).encode(rows())
    part = made.rows(3, 7)
    assert isinstance(part, TwoLevelTensor)
    assert torch.equal(part.decode(), made.decode()[3:7])
    assert part.bits_per_element() == pytest.approx(4 + 16 / 8 + 32 / 32)
    assert TwoLevelQuantizer(128).encode(torch.randn(2, 4096)).bits_per_element() == pytest.approx(4.125 + 32 / 4096)


def test_encode_when_no_group_is_given_expect_one_for_the_row() -> None:
    assert TwoLevelQuantizer().encode(rows()).group_scale.shape == (12, 1)


@pytest.mark.parametrize("size", [0, 5, 64])
def test_encode_when_group_does_not_divide_expect_error(size: int) -> None:
    if size == 0:
        assert TwoLevelQuantizer(size).encode(rows()).group_scale.shape == (12, 1)
        return
    with pytest.raises(UsageError, match="does not divide"):
        TwoLevelQuantizer(size).encode(rows())


def test_middle_codes_when_parts_do_not_belong_together_expect_error() -> None:
    codes, step, zero = torch.full((1, 4), 7, dtype=torch.int8), torch.tensor([[16]]), torch.tensor([[-8]])
    with pytest.raises(KernelError, match="240"):
        middle_codes(codes, step.to(torch.uint8), zero.to(torch.int8))
