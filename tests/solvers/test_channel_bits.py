"""CMPQ on the digest's synthetic layer: which channels get bits, what outliers save, what is stored."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import ClipSearch, CodebookTensor, IntegerGrid, Quantizer
from mergequant.solvers import (
    allocate_channels,
    allocate_greedily,
    channel_levels,
    invert_hessian,
    outlier_mask,
    rtn,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from codebook_cases import SIZE, layer_hessian, layer_weight, relative_error


def energy(kind: str) -> Tensor:
    return layer_hessian(kind).diagonal()


def solved(
    kind: str, bits: Tensor, sensitive: float = 0.0, active: float = 0.0, feedback: bool = False
) -> CodebookTensor:
    kept = outlier_mask(layer_weight(), energy(kind), sensitive, active)
    inverse = invert_hessian(layer_hessian(kind)) if feedback else None
    return channel_levels(layer_weight(), energy(kind), bits, kept, inverse, iterations=15).quantized


def error(kind: str, bits: Tensor, *outliers: float, feedback: bool = False) -> float:
    return relative_error(solved(kind, bits, *outliers, feedback=feedback).decode(), kind)


@pytest.mark.parametrize("average", [2.0, 2.2, 2.4, 3.0, 3.4, 4.0])
@pytest.mark.parametrize("kind", ["spiked", "flat"])
def test_allocation_when_any_average_expect_it_to_be_met(average: float, kind: str) -> None:
    for bits in (
        allocate_channels(energy(kind), average),
        allocate_greedily(layer_weight(), energy(kind), average, iterations=4),
    ):
        assert abs(float(bits.double().mean()) - average) <= 1 / SIZE
        assert 2 <= int(bits.min()) <= int(bits.max()) <= 4


def test_swap_when_norms_are_flat_expect_it_to_be_left_out() -> None:
    assert allocate_channels(energy("flat"), 3.0).unique().tolist() == [3]
    uneven = allocate_channels(energy("uneven"), 3.0)
    assert uneven.unique(return_counts=True)[1].tolist() == [25, SIZE - 50, 25]
    assert error("uneven", uneven) < 0.8 * error("uneven", torch.full((SIZE,), 3))
    # What it is left out for: forced, it loses.
    forced = torch.full((SIZE,), 3)
    order = torch.argsort(energy("flat"), descending=True)
    forced[order[:25]], forced[order[-25:]] = 4, 2
    assert error("flat", forced) > error("flat", torch.full((SIZE,), 3))


def test_channels_when_chosen_by_norm_expect_them_ahead_of_random_where_norms_are_uneven() -> None:
    shuffled = torch.randperm(SIZE, generator=torch.Generator().manual_seed(3))
    for kind, factor in (("spiked", 1.6), ("uneven", 1.6), ("flat", 1.0)):
        by_norm = error(kind, allocate_channels(energy(kind), 2.2))
        at_random = error(kind, allocate_channels(energy(kind)[shuffled], 2.2))
        assert factor * by_norm <= 1.02 * at_random
        assert by_norm < error(kind, torch.full((SIZE,), 2))
        assert error(kind, allocate_greedily(layer_weight(), energy(kind), 2.2)) < by_norm


def test_error_when_bits_grow_expect_it_to_fall_throughout() -> None:
    errors = [error("uneven", allocate_channels(energy("uneven"), 2 + 0.2 * step)) for step in range(11)]
    assert errors == sorted(errors, reverse=True)


def test_outliers_when_kept_expect_both_kinds_to_pay_where_norms_are_uneven() -> None:
    bits = torch.full((SIZE,), 3)
    none, sensitive, active, both = (
        error("spiked", bits, *shares) for shares in ((), (0.0045, 0.0), (0.0, 0.0005), (0.0045, 0.0005))
    )
    assert sensitive < 0.85 * none
    assert active < 0.7 * none
    assert both < min(sensitive, active)
    assert error("flat", bits, 0.0, 0.0005) > 0.85 * error("flat", bits)
    assert error("spiked", bits, 0.0045, 0.0005, feedback=True) < 0.6 * both


def test_levels_when_found_by_column_expect_less_error_than_ranges_by_row() -> None:
    rounded = rtn(layer_weight(), Quantizer(IntegerGrid(3), None, ClipSearch())).quantized.decode()
    assert 1.5 * error("spiked", torch.full((SIZE,), 3)) < relative_error(rounded, "spiked")


def test_outliers_when_decoded_expect_their_values_back() -> None:
    kept = outlier_mask(layer_weight(), energy("spiked"), 0.0045, 0.0005)
    assert int(kept.sum()) == round(0.0045 * SIZE**2) + round(0.0005 * SIZE**2)
    made = solved("spiked", allocate_channels(energy("spiked"), 2.2), 0.0045, 0.0005)
    torch.testing.assert_close(made.decode()[kept], layer_weight()[kept], rtol=1e-3, atol=1e-3)
    assert float(layer_weight()[kept].abs().median()) > 2 * float(layer_weight().abs().median())


def test_bits_when_counted_expect_the_formula() -> None:
    bits = allocate_channels(energy("uneven"), 2.2)
    made = solved("uneven", bits, 0.0045, 0.0005)
    count = round(0.0045 * SIZE**2) + round(0.0005 * SIZE**2)
    levels = 16 * int((2**bits).sum())
    stored = SIZE * int(bits.sum()) + levels + 32 * count + 32 * (SIZE + 1) + 16 * SIZE
    assert made.stored_bits() == stored
    assert [part.bits for part in made.parts] == [3, 2]


def test_allocation_when_average_is_outside_the_palette_expect_error() -> None:
    for average in (1.9, 4.1):
        with pytest.raises(UsageError, match="widths of 2 to 4"):
            allocate_channels(energy("flat"), average)
    with pytest.raises(UsageError, match="at most 3 bits"):
        channel_levels(torch.randn(12, 4), torch.ones(4), torch.full((4,), 4), torch.zeros(12, 4, dtype=torch.bool))
