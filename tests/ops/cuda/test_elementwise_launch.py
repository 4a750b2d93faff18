"""What the host decides for the elementwise CUDA kernels: threads, grid, aligned accesses, kinds of vectors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant.ops.cuda import elementwise
from mergequant.ops.cuda.compiler import Unit

ROW = torch.bfloat16


class Recorder:
    """Stands for compiled kernels: keeps what they are launched with."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.launches: list[tuple[tuple[int, int, int], int, tuple[Any, ...], bool]] = []

    def kernel(self, unit: Unit, name: str, device: torch.device) -> "Recorder":
        self.units.append(unit)
        return self

    def launch(self, grid: tuple[int, int, int], threads: int, args: tuple[Any, ...], *, overlap: bool) -> None:
        self.launches.append((grid, threads, args, overlap))

    def define(self, name: str) -> int | str:
        """A constant of the last unit."""
        return dict(self.units[-1].defines)[name]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    result = Recorder()
    monkeypatch.setattr(elementwise, "kernel", result.kernel)
    monkeypatch.setattr(elementwise, "multiprocessors", lambda device: 4)
    return result


@pytest.mark.parametrize("width", [1, 33, 512, 513, 1000, 4096, 8192, 8193, 14336, 16384, 16385, 28672, 131072])
def test_row_plan_when_width_varies_expect_whole_warps_that_hold_the_row_or_nothing(width: int) -> None:
    threads, held = elementwise._row_plan(width)
    assert 64 <= threads <= 1024
    assert threads & (threads - 1) == 0
    if held:
        assert held * threads * 8 >= width
        assert threads == 64 or threads // 2 * 8 < width, "half of the threads would have nothing to do"
    else:
        assert width > 16384


@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (5, 33), (100_000, 14336), (7, 2048)])
def test_static_when_rows_vary_expect_a_grid_that_covers_them(recorder: Recorder, rows: int, width: int) -> None:
    x = torch.zeros(1, width, dtype=ROW).expand(rows, width)
    out = torch.zeros(1, dtype=torch.int8).expand(rows, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "_rows", lambda tensor: tensor)  # no copy of so many rows
        elementwise._static(x, torch.ones(width), None, None, out, 8)
    grid, threads, args, _ = recorder.launches[-1]
    assert grid[1] * threads * 8 >= width > (grid[1] - 1) * threads * 8
    assert 1 <= grid[0] <= rows
    assert grid[0] == rows or grid[0] * grid[1] >= 4 * 8
    assert args[-3:] == (rows, width, width)
    assert threads == recorder.define("MQ_THREADS")


def test_aligned_when_a_width_or_an_address_is_odd_expect_single_accesses(recorder: Recorder) -> None:
    memory = torch.zeros(4 * 1024 + 8, dtype=ROW)
    ones = torch.ones(1024)
    cases: list[tuple[Tensor, Tensor, int]] = [
        (memory[: 4 * 1024].view(4, 1024), ones, 1),
        (memory[3 : 3 + 4 * 1024].view(4, 1024), ones, 0),
        (memory[8 : 8 + 4 * 1024].view(4, 1024), ones, 1),
        (memory[: 4 * 1001].view(4, 1001), ones[:1001], 0),
        (memory[: 4 * 1016].view(4, 1016), ones[1:1017], 0),
    ]
    for x, multiplier, aligned in cases:
        elementwise.norm_quant(x, multiplier, None, None, 1e-5, 8, False, False)
        assert recorder.define("MQ_ALIGNED") == aligned, tuple(x.shape)


def test_vectors_when_absent_single_or_whole_expect_their_kinds(recorder: Recorder) -> None:
    x, index = torch.zeros(2, 16, dtype=ROW), torch.arange(24) % 16
    for multiplier, shift, kinds in (
        (None, torch.ones(24), (0, 2)),
        (torch.ones(1), None, (1, 0)),
        (torch.ones(24), torch.ones(1), (2, 1)),
    ):
        elementwise.silu_mul_quant(torch.cat((x, x), -1), multiplier, index, shift, 8)
        assert (recorder.define("MQ_MULTIPLIER"), recorder.define("MQ_SHIFT")) == kinds
    assert recorder.define("MQ_GATHERED") == 1
    assert recorder.launches[-1][2][2].dtype == torch.int32


def test_results_when_there_are_no_rows_expect_shapes_and_no_launch(recorder: Recorder) -> None:
    x, ones = torch.zeros(0, 3, 16, dtype=ROW), torch.ones(16)
    assert elementwise.norm_quant(x, ones, None, None, 1e-5, 4, True, True).shape == (0, 3, 8)
    assert elementwise.static_quant(x, ones, None, None, 8, False).shape == (0, 3, 16)
    assert elementwise.silu_mul(x).shape == (0, 3, 8)
    assert elementwise.add_rmsnorm(x, x.clone(), ones, 1e-5).dtype == ROW
    codes, scales = elementwise.silu_mul_dynamic_quant(x, 0.9, 8)
    assert (codes.shape, scales.shape) == ((0, 3, 8), (0, 3, 1))
    assert not recorder.launches
