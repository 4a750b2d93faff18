"""A block of columns in one kernel, against the same loop column by column, through GPTQ and coordinate descent."""

import sys

import pytest
import torch
from torch import Tensor

from mergequant.grids import ClipSearch, IntegerGrid, Quantizer
from mergequant.solvers import SparseGroups, columns, gptq, invert_hessian, spqr, strongest
from mergequant.solvers.coordinate_descent import Descent, quantease

ROWS, WIDTH = 37, 48


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(ROWS, WIDTH, generator=generator), (x.t() @ x).double()


@pytest.fixture(params=[None, 16], ids=["rows", "groups"])
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return Quantizer(IntegerGrid(3), group_size=request.param, range=ClipSearch(), zeros=request.param is not None)


def both(monkeypatch: pytest.MonkeyPatch, solve: object) -> list[Tensor]:
    found = []
    for fused in (False, True):
        monkeypatch.setattr(columns, "usable", lambda like, fused=fused: fused)
        monkeypatch.setattr(sys.modules["mergequant.solvers.spqr"], "usable", lambda like, fused=fused: fused)
        found.append(solve().quantized.decode())  # type: ignore[operator]
    return found


@pytest.mark.parametrize("block", [16, 20])
def test_gptq_expect_what_single_columns_give(
    monkeypatch: pytest.MonkeyPatch, quantizer: Quantizer, block: int
) -> None:
    weight, hessian = problem()
    inverse = invert_hessian(hessian)
    single, fused = both(monkeypatch, lambda: gptq(weight, inverse, quantizer, block=block))
    assert torch.equal(single, fused)


@pytest.mark.parametrize("order", [False, True])
def test_descent_expect_what_single_columns_give(
    monkeypatch: pytest.MonkeyPatch, quantizer: Quantizer, order: bool
) -> None:
    weight, gram = problem()
    descent = Descent(sweeps=6, activation_order=order)
    single, fused = both(monkeypatch, lambda: quantease(weight, gram, quantizer, descent))
    assert torch.equal(single, fused)


@pytest.mark.parametrize(
    "groups", [SparseGroups(3, 16), SparseGroups(4, 8, None), SparseGroups(2, 16, whole_zeros=True)]
)
@pytest.mark.parametrize("chosen", [False, True])
def test_spqr_expect_what_single_columns_give(
    monkeypatch: pytest.MonkeyPatch, groups: SparseGroups, chosen: bool
) -> None:
    weight, hessian = problem()
    inverse = invert_hessian(hessian)
    kept = strongest(weight.abs(), 0.03) if chosen else None
    single, fused = both(
        monkeypatch, lambda: spqr(weight, inverse, groups, threshold=0.05, largest_share=0.1, kept=kept)
    )
    torch.testing.assert_close(single, fused, rtol=0, atol=0)


def test_block_kernel_expect_none_where_it_cannot_run(quantizer: Quantizer) -> None:
    weight, _ = problem()
    rounded = columns.GridColumns(quantizer.grid, *quantizer.find(weight), WIDTH)
    assert columns.block_kernel(rounded, weight, 128) is None  # on a CPU
    assert columns.block_kernel(lambda _, values: values, weight, 128) is None
