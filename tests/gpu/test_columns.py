"""Blocks of columns in one kernel on a GPU: as good as column by column, whose sums come in another order."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergequant.grids import ClipSearch, IntegerGrid, Quantizer
from mergequant.solvers import Solution, SparseGroups, columns, gptq, invert_hessian, output_error, spqr
from mergequant.solvers.coordinate_descent import Descent, quantease

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]
ROWS, WIDTH = 300, 704


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(ROWS, WIDTH, generator=generator).cuda(), (x.t() @ x).double().cuda()


def compare(monkeypatch: pytest.MonkeyPatch, solve: Callable[[], Solution], weight: Tensor, hessian: Tensor) -> None:
    found = []
    for fused in (False, True):
        for module in (columns, sys.modules["mergequant.solvers.spqr"]):
            monkeypatch.setattr(module, "usable", lambda like, fused=fused: fused)
        found.append(solve().quantized.decode())
    single, at_once = found
    assert (single != at_once).float().mean() < 0.2  # one code on a tie turns later ones over
    errors = [output_error(weight - values, hessian) for values in found]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("group_size", [None, 64])
def test_gptq_and_descent_expect_equal_errors(
    monkeypatch: pytest.MonkeyPatch, problem: tuple[Tensor, Tensor], group_size: int | None
) -> None:
    weight, hessian = problem
    quantizer = Quantizer(IntegerGrid(3), group_size=group_size, range=ClipSearch(), zeros=group_size is not None)
    inverse = invert_hessian(hessian)
    compare(monkeypatch, lambda: gptq(weight, inverse, quantizer), weight, hessian)
    descent = Descent(sweeps=8)
    compare(monkeypatch, lambda: quantease(weight, hessian, quantizer, descent), weight, hessian)


def test_spqr_expects_equal_errors(monkeypatch: pytest.MonkeyPatch, problem: tuple[Tensor, Tensor]) -> None:
    weight, hessian = problem
    inverse = invert_hessian(hessian)
    compare(monkeypatch, lambda: spqr(weight, inverse, SparseGroups(3, 16)), weight, hessian)
