"""Outliers and second-level statistics: what is stored decodes to what was meant, and its bits are counted."""

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import Outliers, SecondLevel
from mergequant.grids.second_level import decode_statistics, encode_statistics
from sparse_cases import OUTPUTS, WEIGHTS, WIDTH, weight_of


def residual() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 70, generator=generator).half().float()
    mask = torch.rand(9, 70, generator=generator) < 0.1
    mask[4] = False
    return values, mask


def test_outliers_when_single_expect_values_added_where_the_mask_is() -> None:
    values, mask = residual()
    store = Outliers.single(values, mask)
    dense = torch.ones(9, 70)
    assert torch.equal(store.add_to(dense.clone()), dense + values * mask)
    assert store.count == int(mask.sum())
    assert store.bits == 32 * store.count + 32 * 10
    part = store.rows(3, 7)
    assert torch.equal(part.add_to(torch.zeros(4, 70)), (values * mask)[3:7])


def test_outliers_when_whole_columns_expect_them_added() -> None:
    values, _ = residual()
    store = Outliers.whole(values, torch.tensor([5, 69]))
    found = store.rows(2, 9).add_to(torch.zeros(7, 70))
    assert torch.equal(found[:, [5, 69]], values[2:, [5, 69]])
    assert int((found != 0).any(0).sum()) == 2
    assert store.bits == 2 * 9 * 16 + 2 * 16


def test_outliers_when_columns_need_all_16_bits_expect_them_back() -> None:
    values, mask = torch.ones(1, 65536), torch.zeros(1, 65536, dtype=torch.bool)
    mask[0, [0, 32767, 32768, 65535]] = True
    assert torch.equal(Outliers.single(values, mask).add_to(torch.zeros(1, 65536)), mask.float())
    with pytest.raises(UsageError, match="65536"):
        Outliers.single(torch.ones(1, 65537), torch.zeros(1, 65537, dtype=torch.bool))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_second_level_expect_statistics_within_half_a_step_of_their_tile(bits: int) -> None:
    values = torch.rand(37, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    level = SecondLevel(16, bits)
    codes, grids = encode_statistics(values, level)
    assert (codes.shape, grids.shape) == ((37, 5), (3, 5, 2))
    assert int(codes.max()) == (1 << bits) - 1
    found = decode_statistics(codes, grids, 16)
    for first in range(0, 37, 16):
        part, own = values[first : first + 16], found[first : first + 16]
        step = (part.amax(0) - part.amin(0)) / ((1 << bits) - 1)
        assert bool(((part - own).abs() <= 0.52 * step + 1e-3).all())


@pytest.mark.parametrize("value", [0.0, 1e-3, 7.0, -300.0])
def test_second_level_when_all_rows_are_equal_expect_the_value(value: float) -> None:
    codes, grids = encode_statistics(torch.full((16, 2), value), SecondLevel())
    torch.testing.assert_close(decode_statistics(codes, grids, 16), torch.full((16, 2), value), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("level", [{"tile": 0}, {"bits": 1}, {"bits": 5}])
def test_second_level_when_it_makes_no_sense_expect_error(level: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="second level"):
        SecondLevel(**level)


def test_bits_when_counted_expect_the_papers_formula() -> None:
    """b + (b_s + b_z) / g + 64 / (g gg) + 32 r_o, and what the paper leaves out: row pointers, order, the last tile."""
    made = weight_of("bilevel ordered")
    assert made.outliers is not None
    share = made.outliers.count / (OUTPUTS * WIDTH)
    assert share > 0
    pointers, order, tiles = 32 * (OUTPUTS + 1), 16 * WIDTH, 2 * 16 / OUTPUTS
    expected = 3 + 6 / 16 + 64 / 256 * tiles + 32 * share + (pointers + order) / (OUTPUTS * WIDTH)
    assert made.bits_per_element() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", WEIGHTS)
def test_rows_expect_those_of_the_whole(case: str) -> None:
    made = weight_of(case)
    assert torch.equal(made.rows(0, 16).decode(), made.decode()[:16])
    assert torch.equal(made.rows(16, 20).decode(), made.decode()[16:])
