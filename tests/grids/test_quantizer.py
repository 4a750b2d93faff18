"""Quantizers: rounding, scales, clip search, and what is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergequant.errors import UsageError
from mergequant.grids import AbsMax, ClipSearch, IntegerGrid, QTensor, Quantizer, ZeroTensor, fitting_group


def rows(seed: int = 0, count: int = 9, width: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy-tailed rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, width, generator=generator, dtype=dtype).pow(3)
    values *= torch.logspace(-6, 4, count, dtype=dtype)[:, None]
    values[count // 2] = 0
    return values


def test_nearest_when_ties_expect_even_codes() -> None:
    scaled = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert IntegerGrid(4).nearest(scaled).tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_nearest_when_beyond_the_grid_expect_clamp_to_both_ends() -> None:
    assert IntegerGrid(4).nearest(torch.tensor([-1e9, -8.6, -8.4, 7.4, 7.6, 1e9])).tolist() == [-8, -8, -8, 7, 7, 7]
    finer = torch.tensor(3.0)
    assert IntegerGrid(4).nearest(torch.tensor([-99.0, 20.0, 99.0]), finer).tolist() == [-24, 20, 21]


def test_share_outside_when_codes_are_counted_expect_their_share() -> None:
    scaled = torch.tensor([-9.0, -8.4, 7.4, 7.6, 0.0, 0.0, 0.0, 100.0])
    assert IntegerGrid(4).share_outside(scaled) == pytest.approx(3 / 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("search", [AbsMax(), ClipSearch()])
def test_encode_when_any_quantizer_expect_codes_nearest_among_all_codes(
    bits: int, group_size: int | None, search: AbsMax | ClipSearch
) -> None:
    values = rows()
    quantizer = Quantizer(IntegerGrid(bits), group_size, search)
    encoded = quantizer.encode(values)
    assert encoded.scale.shape == (9, quantizer.groups(24))
    assert encoded.scale.dtype == torch.float32
    assert bool((encoded.scale > 0).all())
    # Every point of the grid is tried, in float64: none may be nearer than the chosen one.
    grid = torch.arange(quantizer.grid.low, quantizer.grid.high + 1, dtype=torch.float64)
    scale = encoded.scale.double().repeat_interleave(24 // quantizer.groups(24), 1)
    best = (values.double()[..., None] - grid * scale[..., None]).abs().amin(-1)
    error = (values.double() - encoded.codes.double() * scale).abs()
    assert bool((error <= best * (1 + 1e-6) + 1e-6 * scale).all())
    assert encoded.codes.unique().numel() > min(2**bits / 2, 50)  # codes spread over the grid


@pytest.mark.parametrize("search", [AbsMax(), ClipSearch()])
@pytest.mark.parametrize("group_size", [None, 8])
def test_decode_when_encoded_again_with_its_scale_expect_the_same_tensor(
    search: AbsMax | ClipSearch, group_size: int | None
) -> None:
    quantizer = Quantizer(IntegerGrid(4), group_size, search)
    once = quantizer.encode(rows())
    twice = quantizer.encode(once.decode(), once.scale)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.decode(), twice.decode())


def test_find_scale_when_absmax_expect_largest_magnitude_at_the_highest_code() -> None:
    values = rows()
    encoded = Quantizer(IntegerGrid(4)).encode(values)
    alive = values.abs().amax(1) > 0
    assert torch.equal(encoded.codes.abs().amax(1)[alive], torch.full((int(alive.sum()),), 7, dtype=torch.int8))
    assert encoded.scale[~alive].tolist() == [[1.0]]
    assert not encoded.codes[~alive].any()


def test_encode_when_a_row_is_too_small_for_a_scale_expect_zeros_and_no_nan() -> None:
    values = torch.full((1, 4), 1e-44)
    for search in (AbsMax(), ClipSearch()):
        encoded = Quantizer(IntegerGrid(4), None, search).encode(values)
        assert not encoded.codes.any()
        assert bool(torch.isfinite(encoded.decode()).all())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 3, 4, 8]),
    norm=st.sampled_from([0.7, 2.0, 2.4, 2.5, 4.0]),
    steps=st.integers(1, 40),
    group_size=st.sampled_from([None, 4, 12]),
)
def test_clip_search_when_compared_in_its_own_norm_expect_never_worse_than_absmax(
    seed: int, bits: int, norm: float, steps: int, group_size: int | None
) -> None:
    values = rows(seed)
    grid = IntegerGrid(bits)

    def loss(search: AbsMax | ClipSearch) -> torch.Tensor:
        error = Quantizer(grid, group_size, search).encode(values).decode().double() - values.double()
        return error.abs().pow(norm).reshape(9, -1, group_size or 24).sum(-1)

    searched, plain = loss(ClipSearch(norm, steps)), loss(AbsMax())
    assert bool((searched <= plain * (1 + 1e-4) + 1e-30).all())


def test_clip_search_when_one_outlier_in_a_row_of_2_bits_expect_much_less_error() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    values[:, 5] = 5.0
    grid = IntegerGrid(2)
    errors = [
        (Quantizer(grid, None, search).encode(values).decode() - values).square().sum()
        for search in (ClipSearch(2.0), AbsMax())
    ]
    assert errors[0] < 0.8 * errors[1]


def test_clip_search_when_one_step_expect_absmax_exactly() -> None:
    values = rows()
    searched = Quantizer(IntegerGrid(4), None, ClipSearch(steps=1)).find_scale(values)
    assert torch.equal(searched, Quantizer(IntegerGrid(4)).find_scale(values))


def test_clip_search_when_fractions_are_listed_expect_even_steps_from_one_to_least() -> None:
    fractions = ClipSearch(steps=5, least=0.2).fractions()
    assert fractions == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("norm", "steps", "least"), [(0, 3, 0.5), (2, 0, 0.5), (2, 3, 0), (2, 3, 1.1)])
def test_clip_search_when_values_make_no_sense_expect_error(norm: float, steps: int, least: float) -> None:
    with pytest.raises(UsageError, match="clip search"):
        ClipSearch(norm, steps, least)


@pytest.mark.parametrize("group_size", [0, -4, 5, 25])
def test_groups_when_size_does_not_divide_the_row_expect_error(group_size: int) -> None:
    with pytest.raises(UsageError, match="does not divide"):
        Quantizer(IntegerGrid(4), group_size).encode(rows())


@pytest.mark.parametrize(
    ("bits", "groups", "expected"),
    [(4, 1, 4 + 32 / 16), (4, 4, 4 + 4 * 32 / 16), (2, 1, 4 + 32 / 16), (8, 2, 8 + 2 * 32 / 16), (5, 1, 8 + 32 / 16)],
)
def test_bits_per_element_when_counted_expect_containers_and_scales(bits: int, groups: int, expected: float) -> None:
    tensor = QTensor(torch.zeros(3, 16, dtype=torch.int8), torch.ones(3, groups), IntegerGrid(bits))
    assert tensor.bits_per_element() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("width", "wanted", "fits"),
    [(256, 128, 128), (11008, 128, 128), (320, 128, 80), (52, 32, 26), (40, 128, 0), (997, 128, 0), (64, 0, 0)],
)
def test_fitting_group_expect_largest_divisor_or_a_whole_row(width: int, wanted: int, fits: int) -> None:
    assert fitting_group(width, wanted) == fits
    assert fits == 0 or width % fits == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("search", [AbsMax(), ClipSearch()])
def test_encode_when_zeros_are_asked_for_expect_nearest_codes_and_zero_itself(
    bits: int, search: AbsMax | ClipSearch
) -> None:
    values = rows() + rows(1).abs()
    made = Quantizer(IntegerGrid(bits), 6, search, zeros=True).encode(values)
    assert isinstance(made, ZeroTensor)
    assert made.zero.dtype == torch.int8
    grid = torch.arange(made.grid.low, made.grid.high + 1, dtype=torch.float64)
    scale, zero = (part.double().repeat_interleave(6, 1) for part in (made.scale, made.zero))
    best = (values.double()[..., None] - (grid - zero[..., None]) * scale[..., None]).abs().amin(-1)
    assert bool(((values.double() - made.decode().double()).abs() <= best * (1 + 1e-6) + 1e-5 * scale).all())
    assert bool((made.zero >= made.grid.low).all())
    assert bool((made.zero <= made.grid.high).all())  # 0 is a value of the grid
    again = Quantizer(made.grid, 6, search, zeros=True).encode(made.decode(), made.scale, made.zero)
    assert torch.equal(again.codes, made.codes)
    part = made.rows(2, 5)
    assert torch.equal(part.decode(), made.decode()[2:5])


def test_encode_when_values_have_one_sign_expect_zeros_to_halve_the_step() -> None:
    values = rows().abs()
    plain, shifted = (Quantizer(IntegerGrid(4), 8, AbsMax(), zeros) for zeros in (False, True))
    assert bool((shifted.find_scale(values) < plain.find_scale(values) * 0.51)[rows().abs().amax(1) > 0].all())
    error = [(quantizer.encode(values).decode() - values).square().sum() for quantizer in (plain, shifted)]
    assert error[1] < 0.5 * error[0]


def test_bits_when_there_are_zeros_expect_them_counted() -> None:
    values = torch.randn(4, 256)
    assert Quantizer(IntegerGrid(4), 64, zeros=True).encode(values).bits_per_element() == 4 + 40 / 64
