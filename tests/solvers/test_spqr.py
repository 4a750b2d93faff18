"""SpQR's solver (SpQR digest, "How to know it works", on another draw of its synthetic layer)."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import AbsMax, IntegerGrid, Quantizer, SecondLevel, SparseTensor
from mergequant.solvers import (
    InverseFactor,
    SparseGroups,
    gptq,
    invert_hessian,
    output_error,
    rtn,
    spqr,
    strongest,
    sweep,
)
from sparse_cases import drawn

INFINITE = float("inf")


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, InverseFactor]:
    weight, hessian = drawn(192, 192)
    return weight, hessian, invert_hessian(hessian)


def solve(weight: Tensor, inverse: InverseFactor | None, groups: SparseGroups, **options: object) -> SparseTensor:
    made = spqr(weight, inverse, groups, **options).quantized  # type: ignore[arg-type]
    assert isinstance(made, SparseTensor)
    return made


def share(made: SparseTensor) -> float:
    return 0.0 if made.outliers is None else made.outliers.count / made.codes.numel()


def test_spqr_expect_the_order_of_methods_of_the_digest(layer: tuple[Tensor, Tensor, InverseFactor]) -> None:
    weight, hessian, inverse = layer
    whole = output_error(weight, hessian)

    def error(values: Tensor) -> float:
        return output_error(values - weight, hessian) / whole

    for bits, loss in ((3, 1.10), (4, 1.45)):
        rows, grouped = (Quantizer(IntegerGrid(bits), size, AbsMax()) for size in (None, 64))
        rounded = error(rtn(weight, rows).quantized.decode())
        plain = error(gptq(weight, inverse, rows).quantized.decode())
        groups = error(gptq(weight, inverse, grouped).quantized.decode())
        full = error(solve(weight, inverse, SparseGroups(bits, 16, None), threshold=INFINITE).decode())
        bilevel = error(solve(weight, inverse, SparseGroups(bits, 16), threshold=INFINITE).decode())
        kept = solve(weight, inverse, SparseGroups(bits, 16), threshold=0.5)
        assert error(kept.decode()) < 0.7 * bilevel < 0.7 * groups < 0.7 * plain < 0.7 * rounded
        assert full < bilevel < loss * full  # quantized statistics cost little
        assert 0 < share(kept) < 0.01


@pytest.mark.parametrize("size", [16, None])
@pytest.mark.parametrize("level", [SecondLevel(), SecondLevel(7, 4), None])
def test_spqr_expect_stored_parts_to_decode_to_what_the_sweep_propagated(
    size: int | None, level: SecondLevel | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = drawn(21, 48)
    inverse = invert_hessian(hessian, damping=0.01)
    seen: list[Tensor] = []

    def remember(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        result = sweep(*args, **options)
        seen.append(result[0])
        return result

    monkeypatch.setattr(sys.modules["mergequant.solvers.spqr"], "sweep", remember)
    made = solve(weight, inverse, SparseGroups(3, size, level), threshold=0.05)
    assert made.outliers is not None
    assert torch.equal(made.decode(), seen[-1])


def test_outliers_expect_fewer_with_a_higher_threshold_and_none_with_an_infinite_one(
    layer: tuple[Tensor, Tensor, InverseFactor],
) -> None:
    weight, _hessian, inverse = layer
    shares = [share(solve(weight, inverse, SparseGroups(), threshold=tau)) for tau in (0.05, 0.2, 1.0, 5.0, INFINITE)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2] > shares[-1] == 0
    capped = solve(weight, inverse, SparseGroups(), threshold=0.05, largest_share=0.004)
    assert 0.001 < share(capped) <= 0.004 < shares[0]


def test_outliers_when_huge_weights_are_planted_expect_all_of_them(layer: tuple[Tensor, Tensor, InverseFactor]) -> None:
    weight, _hessian, inverse = layer
    places = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))[: weight.numel() // 1000]
    planted = weight.clone()
    planted.view(-1)[places] = 20 * weight.std()
    made = solve(planted, inverse, SparseGroups(), threshold=0.2)
    assert made.outliers is not None
    kept = torch.zeros(weight.shape)
    made.outliers.add_to(kept)
    assert bool((kept.view(-1)[places] != 0).all())


def test_leave_one_out_expect_groups_that_fit_the_others_better() -> None:
    """One weight of a group is far away: without it, the other fifteen have a grid of their own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator) * 0.01
    weight[:, 5] = 1.0
    inverse = invert_hessian(torch.eye(16, dtype=torch.float64))
    groups = SparseGroups(3, 16, None)
    fitted, spoiled = (solve(weight, inverse, groups, threshold=3.0, leave_one_out=flag) for flag in (True, False))
    assert fitted.outliers is not None
    assert spoiled.outliers is not None
    assert 64 <= fitted.outliers.count < 0.5 * spoiled.outliers.count
    assert float((fitted.decode() - weight).norm()) < float((spoiled.decode() - weight).norm())
    torch.testing.assert_close(fitted.decode()[:, 5], weight[:, 5], rtol=1e-3, atol=0)


def test_kept_weights_expect_them_exact_and_out_of_the_ranges() -> None:
    weight, hessian = drawn(32, 64)
    mask = strongest(weight.abs(), 0.02)
    assert int(mask.sum()) == round(0.02 * weight.numel())
    for inverse in (None, invert_hessian(hessian)):
        made = solve(weight, inverse, SparseGroups(3, 16, None, whole_zeros=True), kept=mask)
        none = solve(weight, inverse, SparseGroups(3, 16, None, whole_zeros=True), kept=torch.zeros_like(mask))
        assert made.outliers is not None
        assert made.outliers.count == int(mask.sum())
        assert none.outliers is None
        assert made.zero is not None
        assert torch.equal(made.zero, made.zero.round())
        spent, plain = (output_error(part.decode() - weight, hessian) for part in (made, none))
        assert spent < plain
        if inverse is None:
            torch.testing.assert_close(made.decode()[mask], weight[mask], rtol=1e-3, atol=1e-4)


def test_strongest_when_scores_are_equal_expect_exactly_the_share() -> None:
    assert int(strongest(torch.ones(40, 25), 0.01).sum()) == 10


def test_spqr_when_rows_or_groups_are_constant_or_dead_expect_finite_values() -> None:
    weight, hessian = drawn(20, 32)
    weight[3], weight[4, :16] = 0, 0.25
    hessian[:, 7], hessian[7] = 0, 0
    made = solve(weight, invert_hessian(hessian), SparseGroups(3, 16))
    assert bool(made.decode().isfinite().all())
    assert float(made.decode()[3].abs().max()) < 0.1 * float(weight.std())
    assert bool(solve(torch.zeros(16, 32), None, SparseGroups(3, 16)).decode().abs().max() < 1e-3)


def test_spqr_when_the_group_does_not_divide_the_width_expect_error() -> None:
    weight, hessian = drawn(8, 20)
    with pytest.raises(UsageError, match="does not divide"):
        spqr(weight, invert_hessian(hessian), SparseGroups(3, 16))
