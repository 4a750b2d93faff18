"""Compiling, caching and launching on a GPU: arguments arrive, errors are errors, graphs replay."""

import time

import pytest
import torch

from mergequant.errors import KernelError
from mergequant.ops.cuda import compiler, disk_cache, launch
from mergequant.ops.cuda.compiler import Unit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
SOURCE = """
extern "C" __global__ void fill(float* out, const float* in, int n, float factor, long long big, const float* none) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __fadd_rn(__fmul_rn(in[i], factor), (float)(big >> 32)) + (none ? 1000.f : 0.f);
}
"""


@pytest.fixture
def unit(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    (tmp_path / "fill.cu").write_text(SOURCE)
    return Unit("fill.cu", (("MQ_RUN", abs(hash(tmp_path)) % 10**6),))


def test_launch_when_called_expect_every_argument_to_arrive(unit) -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(1000, device=device)
    out = torch.full_like(x, float("nan"))
    fill = launch.kernel(unit, "fill", device)
    fill.launch((4, 1, 1), 256, [out, x, 1000, 2.5, launch.Long(7 << 32), None], overlap=True)
    assert torch.equal(out, x * 2.5 + 7)
    fill.launch((4, 1, 1), 256, [out, x, 1000, 2.5, launch.Long(7 << 32), x])
    assert torch.equal(out, x * 2.5 + 7 + 1000)
    assert disk_cache.read(launch._key(unit, launch.architecture(device))) is not None


def test_launch_when_captured_expect_replays_to_run(unit) -> None:
    device = torch.device("cuda", 0)
    x, out = torch.ones(256, device=device), torch.zeros(256, device=device)
    fill = launch.kernel(unit, "fill", device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            fill.launch((1, 1, 1), 256, [out, x, 256, 3.0, launch.Long(0), None], overlap=True)
    x.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.full_like(out, 6.0))


def test_launch_when_the_grid_is_impossible_expect_an_error_with_the_kernels_name(unit) -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(4, device=device)
    with pytest.raises(KernelError, match="fill"):
        launch.kernel(unit, "fill", device).launch((1, 1, 1), 4096, [x, x, 4, 1.0, launch.Long(0), None])
    with pytest.raises(KernelError, match="shared"):
        launch.kernel(unit, "fill", device).launch((1, 1, 1), 32, [x, x, 4, 1.0, launch.Long(0), None], shared=1 << 20)
    with pytest.raises(KernelError, match="nothing"):
        launch.kernel(unit, "nothing", device)


def test_tensor_map_when_rows_are_not_aligned_expect_error() -> None:
    with pytest.raises(KernelError, match="aligned"):
        launch.tensor_map(torch.zeros(4, 24, dtype=torch.int8, device="cuda"), (4, 24), False)


def test_launch_overhead_is_printed(unit, capsys) -> None:
    """Not a limit: the figure that the docs quote."""
    device = torch.device("cuda", 0)
    x = torch.ones(256, device=device)
    fill = launch.kernel(unit, "fill", device)
    args = [x, x, 256, 1.0, launch.Long(0), None]
    for _ in range(100):
        fill.launch((1, 1, 1), 256, args)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(1000):
        fill.launch((1, 1, 1), 256, args)
    spent = (time.perf_counter() - started) / 1000
    torch.cuda.synchronize()
    with capsys.disabled():
        print(f"\nlaunch from Python: {spent * 1e6:.1f} us")
    assert torch.isfinite(x).all()
