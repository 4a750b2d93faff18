"""The elementwise Triton and CUDA kernels on a GPU: the torch references on the same GPU, and float64.

Where both do the same float32 operations (`static_quant`, `dynamic_quant`, the residual) results are equal bit for bit;
a sum in another order, or another exp, may move a value across a tie.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elementwise_cases import CLIP, DYNAMIC, EPS, KERNELS, Case, assert_near_exact, draw, run, unpack
from mergequant import ops
from mergequant.ops.backends import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]
SHAPES = [  # rows, channels, gathered width; 20000 does not fit into a program
    *((3, 33, None), (1, 4096, None), (17, 1000, None), (2049, 4096, None), (5, 14336, None), (130, 20000, None)),
    *((3, 4096, 4608), (200, 1000, 1100), (5, 20000, 21000), (1030, 4096, 4416)),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BACKENDS = ("triton", "cuda")
HADAMARD = [40, 172, 1408, 4096, 5120, 11008, 13824, 14336, 18944, 28672]
SHARES = {  # of codes that may differ from torch's by one
    **dict.fromkeys(("static_quant", "dynamic_quant"), 0.0),
    **dict.fromkeys(("rmsnorm_quant", "add_rmsnorm_quant"), 1e-5),
    "layernorm_quant": 2e-5,
    **dict.fromkeys(("silu_mul_quant", "silu_mul_dynamic_quant"), 3e-4),
}


def poison() -> None:
    """What the allocator hands out next holds the code 85 everywhere, so that an element left out shows."""
    blocks = [torch.full((size,), 85, dtype=torch.int8, device="cuda") for size in (2**10, 2**16, 2**20, 2**24, 2**26)]
    del blocks


def both(name: str, case: Case, backend: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of the reference and of the kernel."""
    with use_backend("torch"):
        expected = run(name, case)
    poison()
    with use_backend(backend):
        return expected, run(name, case)


def assert_same(name: str, case: Case, expected: Tensor, got: Tensor, share: float) -> None:
    """Codes are equal but for a share of them, which is off by one."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    apart = (unpack(got, case) - unpack(expected, case)).abs()
    wrong = apart.nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        report = (
            f"{name} {tuple(case.x.shape)} {case.x.dtype} bits {case.bits}: {len(wrong)} of {apart.numel()} codes "
            f"differ from torch's, by up to {int(apart.max())}; first at {place}: got {unpack(got, case)[place]}, "
            f"expected {unpack(expected, case)[place]}"
        )
        assert len(wrong) <= share * apart.numel() + (share > 0), report
        assert int(apart.max()) <= 1, report


def compare(name: str, case: Case, backend: str) -> None:
    """One case of one kernel."""
    case = case.to("cuda")
    expected, got = both(name, case, backend)
    assert_same(name, case, expected[0], got[0], SHARES[name])
    if name in DYNAMIC:
        torch.testing.assert_close(got[1], expected[1], rtol=0 if name == "dynamic_quant" else 1e-6, atol=0)
    elif len(got) > 1:
        assert torch.equal(got[1], expected[1]), f"{name} {tuple(case.x.shape)} {case.x.dtype}: residuals differ"
    # bfloat16 values in simple proportion to a row's largest lie on ties of the exact quotient, rather often.
    assert_near_exact(name, case, got[0], share=1e-3 if name in DYNAMIC else 3e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("rows", "channels", "width"), SHAPES)
def test_kernel_equals_torch_over_shapes(name: str, rows: int, channels: int, width: int | None, backend: str) -> None:
    compare(name, draw(rows, channels, 8, torch.bfloat16, width=width, shifted=width is not None), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_torch_over_dtypes_bits_and_vectors(name: str, dtype: torch.dtype, backend: str) -> None:
    for bits, shifted, one in ((8, True, False), (4, False, True)):
        compare(name, draw(65, 1408, bits, dtype, shifted=shifted, one=one), backend)
        compare(name, draw(65, 1407, bits, dtype, shifted=shifted, one=one), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["static_quant", "rmsnorm_quant", "layernorm_quant", "dynamic_quant"])
@pytest.mark.parametrize(
    ("rows", "channels", "width"), [(3, 66, None), (129, 4096, None), (5, 20000, None), (9, 40, 50)]
)
def test_packed_kernel_equals_torch(name: str, rows: int, channels: int, width: int | None, backend: str) -> None:
    compare(name, draw(rows, channels, 4, torch.bfloat16, width=width, packed=True), backend)


def test_cuda_kernels_take_views_that_begin_anywhere() -> None:
    case = draw(4, 1024, 8, torch.bfloat16, width=1032, shifted=True).to("cuda")
    memory = torch.empty(4 * 1024 + 3, dtype=torch.bfloat16, device="cuda")
    x = memory[3:].view(4, 1024).copy_(case.x)
    vectors = (case.multiplier, case.index.long(), case.shift)
    with use_backend("torch"):
        expected = ops.static_quant(case.x, *vectors, 8)
    with use_backend("cuda"):
        assert torch.equal(ops.static_quant(x, *vectors, 8), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 4096), (130, 1000), (3, 20000)])
def test_float_kernels_equal_torch(dtype: torch.dtype, rows: int, channels: int, backend: str) -> None:
    case = draw(rows, channels, dtype=dtype).to("cuda")
    weight = torch.rand(channels, device="cuda").to(dtype)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda residual: ops.add_rmsnorm(case.x, residual, weight, EPS),
        lambda residual: ops.add_rmsnorm(None, residual, weight, EPS),
        lambda residual: ops.add_rmsnorm(case.x, residual, weight, EPS, torch.linspace(-9, 9, channels, device="cuda")),
        lambda residual: ops.silu_mul(case.gate_up),
    ]
    for call in calls:
        residuals = (case.residual.clone(), case.residual.clone())
        with use_backend("torch"):
            expected = call(residuals[0])
        with use_backend(backend):
            got = call(residuals[1])
        assert torch.equal(*residuals)
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", HADAMARD)
@pytest.mark.parametrize("rows", [1, 300, 1200])
@pytest.mark.parametrize("gated", [False, True])
def test_hadamard_kernels_near_float64(channels: int, rows: int, gated: bool, backend: str) -> None:
    for name in (f"{'silu_mul_' if gated else ''}{kind}" for kind in ("hadamard_quant", "hadamard_dynamic_quant")):
        case = draw(rows, channels, dtype=torch.bfloat16, one=True).to("cuda")
        poison()
        with use_backend(backend):
            got = run(name, case)
        if gated:  # another exponential rounds some products to the neighbouring bfloat16, which moves all of a row
            with use_backend("torch"):
                wanted = run(name, case)
            assert_same(name, case, wanted[0], got[0], share=2e-2)
            continue
        assert_near_exact(name, case, got[0], share=1e-2, near=2e-2)
        if name in DYNAMIC:
            largest = ops.hadamard_transform(case.x.double()).abs().amax(-1, keepdim=True)
            torch.testing.assert_close(got[1].double(), largest * CLIP / 127, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [704, 768, 4096, 11008])
def test_hadamard_kernels_near_float64_over_dtypes_and_vectors(dtype: torch.dtype, channels: int, backend: str) -> None:
    for case in (draw(33, channels, 4, dtype, shifted=True), draw(33, channels, 8, dtype, width=channels + 8)):
        on_gpu = case.to("cuda")
        with use_backend(backend):
            got = run("hadamard_quant", on_gpu)
        assert_near_exact("hadamard_quant", on_gpu, got[0], share=1e-2, near=2e-2)


@pytest.mark.parametrize("channels", [704, 4096, 11008, 28672])
def test_hadamard_rotation_is_good_to_a_part_in_ten_thousand_of_the_row(channels: int) -> None:
    from mergequant.ops.triton import hadamard_quant as kernels

    x = draw(200, channels, dtype=torch.bfloat16).x.cuda()
    x[:, 3] *= 300  # an outlier, as an MLP's activations have them
    rotated = torch.empty(x.shape, device="cuda")
    kernels._launch(x, None, None, rotated, None, None, None)
    exact = ops.hadamard_transform(x.double())
    error = ((rotated - exact).abs().amax(-1) / exact.abs().amax(-1)).max()
    print(f"hadamard {channels}: largest error over the row's largest value {float(error):.2e}")
    assert float(error) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlapped_graph_equals_separate_launches(backend: str) -> None:
    """Forty kernels, each reading what the last one wrote, captured with and without overlap, replayed three times."""
    case = draw(3, 4096, dtype=torch.bfloat16, one=True).to("cuda")
    gain = torch.rand(4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 30
    x, residual = case.x.clone(), case.residual.clone()
    results: list[Tensor] = []

    def step() -> None:
        with use_backend(backend):
            chain()

    def chain() -> None:
        results.clear()
        inner = x
        for _ in range(10):
            codes = ops.add_rmsnorm_quant(inner, residual, gain, None, None, EPS, 8)
            back = codes.to(torch.bfloat16) * 0.05
            inner = ops.silu_mul(torch.cat((back, back), -1))
            turned, scale = ops.hadamard_dynamic_quant(inner, 1.0, 8)
            again, fine = ops.dynamic_quant(turned.to(torch.bfloat16) * scale.to(torch.bfloat16), 0.9, 8)
            results.extend((codes, turned, again, fine))

    def reset() -> None:
        residual.copy_(case.residual)

    reset()
    step()
    torch.cuda.synchronize()
    expected = [tensor.clone() for tensor in (*results, residual)]
    assert len({int(tensor.float().abs().sum()) for tensor in expected}) > 10
    for overlap in (False, True):
        reset()
        with ops.overlapping(overlap):
            step()  # compiles this variant outside the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for _ in range(3):
            reset()
            graph.replay()
            torch.cuda.synchronize()
            for number, (got, wanted) in enumerate(zip((*results, residual), expected, strict=True)):
                assert torch.equal(got, wanted), f"overlap {overlap}: result {number} differs"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_two_to_the_31_elements_are_reached(backend: str) -> None:
    rows, channels = 75_000, 28_672  # 2.15e9 bfloat16 values
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.ones(rows, channels, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3
    with use_backend(backend):
        results = (
            ops.static_quant(x, torch.full((1,), 2.0, device="cuda"), None, None, 8),
            ops.dynamic_quant(x, 1.0, 8)[0],
            ops.rmsnorm_quant(x, torch.full((1,), 6.0, device="cuda"), None, None, EPS, 8),
        )
    for codes in results:
        assert int(codes[-1].min()) == int(codes[-1].max()) == {2: 6, 127: 127, 6: 6}[int(codes[0, 0])]
