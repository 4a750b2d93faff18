"""VPTQ on the digest's synthetic layer ("How to know it works"), and the sweep with books."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from mergequant.errors import UsageError
from mergequant.grids import ClipSearch, CodebookTensor, IntegerGrid, Quantizer
from mergequant.solvers import Section, code_columns, find_books, gptq, invert_hessian, rtn, tune_books, vector_gptq

sys.path.insert(0, str(Path(__file__).parents[1]))

from codebook_cases import SIZE, layer_hessian, layer_weight, relative_error

NATURAL = torch.arange(SIZE)
V4 = Section(SIZE, 4, 8)


@cache
def made(section: Section, *, ordered: bool = True, weighted: bool = True, kind: str = "spiked") -> CodebookTensor:
    inverse = invert_hessian(layer_hessian(kind), activation_order=ordered)
    energy = layer_hessian(kind).diagonal() if weighted else torch.ones(SIZE)
    return vector_gptq(layer_weight(), inverse, energy, [section], iterations=25).quantized


def test_vptq_at_two_bits_expect_much_less_error_than_gptq_and_rtn() -> None:
    quantizer = Quantizer(IntegerGrid(2), 128, ClipSearch())
    rounded = relative_error(rtn(layer_weight(), quantizer).quantized.decode(), "spiked")
    swept = relative_error(gptq(layer_weight(), layer_hessian("spiked"), quantizer).quantized.decode(), "spiked")
    vectors, residual = (relative_error(made(own).decode(), "spiked") for own in (V4, Section(SIZE, 8, 8, 8)))
    assert rounded > 1.5 * swept > 1.5 * 3.5 * vectors
    assert residual < vectors


def test_kmeans_when_weighted_by_the_hessian_expect_gain_where_channels_are_uneven_alone() -> None:
    weighted, plain = (relative_error(made(V4, weighted=own).decode(), "spiked") for own in (True, False))
    assert 1.4 * weighted < plain
    weighted, plain = (relative_error(made(V4, weighted=own, kind="flat").decode(), "flat") for own in (True, False))
    assert 0.95 < weighted / plain < 1.05


def test_sweep_when_compared_with_nearest_entries_expect_half_the_error_and_order_to_help() -> None:
    books = find_books(layer_weight(), layer_hessian("spiked").diagonal(), NATURAL, [V4], iterations=25)
    nearest, left = code_columns(layer_weight(), None, NATURAL, [V4], books)
    torch.testing.assert_close(left, layer_weight() - nearest.decode())
    swept = relative_error(made(V4).decode(), "spiked")
    assert 2 * swept < relative_error(nearest.decode(), "spiked")
    assert swept < relative_error(made(V4, ordered=False).decode(), "spiked")


def test_residual_books_when_added_expect_them_to_pay_and_both_indices_to_count() -> None:
    plain, both = made(V4), made(Section(SIZE, 4, 8, 4))
    assert relative_error(both.decode(), "spiked") < 0.6 * relative_error(plain.decode(), "spiked")
    assert both.parts[0].book.shape == (1, 256 + 16, 4)
    assert both.bits_per_element() == (8 + 4) / 4 + 16 * 272 * 4 / SIZE**2


def test_outlier_columns_when_strong_expect_less_error_and_the_order_to_be_stored() -> None:
    sections = [Section(8, 2, 8), Section(SIZE - 8, 4, 8, groups=2)]
    inverse = invert_hessian(layer_hessian("spiked"))
    weight = vector_gptq(layer_weight(), inverse, layer_hessian("spiked").diagonal(), sections, iterations=25).quantized
    assert relative_error(weight.decode(), "spiked") < relative_error(made(V4).decode(), "spiked")
    assert weight.order is not None
    assert torch.equal(weight.order, inverse.order)
    assert set(weight.order[:4].tolist()) == {0, 64, 128, 192}
    assert made(V4).order is None  # one codebook serves columns in any order


def test_sweep_when_coded_expect_stored_centroids_and_rows_that_are_padded() -> None:
    weight, hessian = layer_weight()[:50, :60], layer_hessian("uneven")[:60, :60]
    section = Section(60, 4, 5)
    solved = vector_gptq(weight, invert_hessian(hessian), hessian.diagonal(), [section], iterations=5).quantized
    assert solved.parts[0].symbols.shape == (13, 60)
    assert solved.decode().shape == weight.shape
    book = {tuple(entry) for entry in solved.parts[0].book[0].float().tolist()}
    assert all(tuple(vector) in book for vector in solved.decode()[:48].t().reshape(-1, 4).tolist())


def test_vptq_when_a_channel_is_dead_expect_zeros_that_sway_nothing() -> None:
    hessian = layer_hessian("uneven")[:40, :40].clone()
    hessian[3] = hessian[:, 3] = 0
    weight = layer_weight()[:40, :40].clone()
    weight[:, 3] = 1e4
    solved = vector_gptq(weight, invert_hessian(hessian), hessian.diagonal(), [Section(40, 4, 4)], iterations=5)
    assert float(solved.quantized.parts[0].book.abs().max()) < 100


@pytest.mark.parametrize("method", ["adam", "least_squares"])
@pytest.mark.parametrize("section", [V4, Section(SIZE, 8, 8, 8)])
def test_tuning_when_centroids_move_expect_less_error_and_codes_as_they_were(section: Section, method: str) -> None:
    before = made(section)
    hessian = layer_hessian("spiked")
    after = tune_books(before, layer_weight(), hessian, method, steps=15, rate=2e-3)  # type: ignore[arg-type]
    gain = relative_error(after.decode(), "spiked") / relative_error(before.decode(), "spiked")
    assert gain < (0.96 if section.residual_bits else 0.995)
    assert torch.equal(after.parts[0].symbols, before.parts[0].symbols)
    assert after.parts[0].book.dtype == torch.float16
    assert tune_books(before, layer_weight(), hessian, "adam", steps=2, rate=10.0) is before


def test_books_when_too_few_vectors_or_groups_do_not_divide_expect_error_with_what_works() -> None:
    with pytest.raises(UsageError, match=r"serves only 1024 vectors.*at most 10 bits"):
        find_books(torch.zeros(64, 64), torch.ones(64), torch.arange(64), [Section(64, 4, 12)])
    with pytest.raises(UsageError, match=r"5 groups do not divide 64 columns; use one of \[1, 2, 4\]"):
        find_books(torch.zeros(64, 64), torch.ones(64), torch.arange(64), [Section(64, 4, 2, groups=5)])
    with pytest.raises(UsageError, match="beyond float16"):
        find_books(torch.full((8, 8), 1e6), torch.ones(8), torch.arange(8), [Section(8, 2, 1)])
