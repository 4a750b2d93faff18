"""The elementwise Triton kernels in the interpreter, against the torch references."""

import pytest
import torch

from elementwise_cases import DYNAMIC, EPS, KERNELS, Case, assert_near_exact, draw, run
from mergequant import ops
from mergequant.ops import backends
from mergequant.ops.backends import use_backend

SHAPES = [(1, 64, None), (3, 33, None), (2, 700, None), (3, 96, 130), (2, 40, 36)]  # rows, channels, gathered width


def compare(name: str, case: Case) -> None:
    """Codes, scales and residual of the kernel are the reference's; see conftest for what may differ, and how much."""
    with use_backend("torch"):
        expected = run(name, case)
    with use_backend("triton"):
        got = run(name, case)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    if name in DYNAMIC:
        # exp may differ by an ulp
        torch.testing.assert_close(got[1], expected[1], rtol=0 if name == "dynamic_quant" else 1e-6, atol=0)
    elif len(got) > 1:
        assert torch.equal(got[1], expected[1])
        assert not torch.equal(got[1], case.residual)
    different = (got[0] != expected[0]).sum()
    assert int(different) <= (0 if name == "static_quant" else 2e-3 * got[0].numel() + 1)
    assert_near_exact(name, case, got[0], share=2e-3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("rows", "channels", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_when_interpreted_expect_reference_codes(
    name: str, rows: int, channels: int, width: int | None, dtype: torch.dtype
) -> None:
    for shifted, one in ((True, False), (False, True)):
        compare(name, draw(rows, channels, 8, dtype, width=width, shifted=shifted, one=one))


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "add_rmsnorm_quant"])
def test_kernel_when_input_is_bfloat16_expect_reference_codes(name: str) -> None:
    compare(name, draw(3, 96, 8, torch.bfloat16))


@pytest.mark.parametrize("name", ["static_quant", "rmsnorm_quant", "layernorm_quant", "dynamic_quant"])
@pytest.mark.parametrize(("channels", "width"), [(66, None), (700, None), (40, 50)])
@pytest.mark.parametrize("bits", [2, 4])
def test_kernel_when_packed_expect_reference_bytes(name: str, channels: int, width: int | None, bits: int) -> None:
    compare(name, draw(3, channels, bits, width=width, packed=True))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", [None, 130])
def test_kernel_when_row_is_longer_than_a_program_holds_expect_reference_codes(
    name: str, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergequant.ops.triton.common.MOST_HELD", 32)
    monkeypatch.setattr("mergequant.ops.triton.static_quant.BLOCK_FEW_ROWS", 32)
    compare(name, draw(3, 100, 8, width=width, shifted=True))


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_when_there_are_no_rows_expect_no_codes(name: str) -> None:
    with use_backend("triton"):
        assert run(name, draw(0, 64))[0].shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [64, 100])
def test_add_rmsnorm_when_interpreted_expect_the_reference(
    dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(3, channels, dtype=dtype)
    weight = torch.rand(channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    for held in (16384, 32):
        monkeypatch.setattr("mergequant.ops.triton.common.MOST_HELD", held)
        for x, bias in ((case.x, None), (None, None), (case.x, torch.linspace(-9, 9, channels))):
            residuals = (case.residual.clone(), case.residual.clone())
            with use_backend("torch"):
                expected = ops.add_rmsnorm(x, residuals[0], weight, EPS, bias)
            with use_backend("triton"):
                got = ops.add_rmsnorm(x, residuals[1], weight, EPS, bias)
            assert torch.equal(*residuals)
            assert torch.equal(residuals[0], case.residual) == (x is None)
            torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_silu_mul_when_interpreted_expect_the_reference(dtype: torch.dtype) -> None:
    gate_up = draw(3, 1100, dtype=dtype).gate_up
    with use_backend("torch"):
        expected = ops.silu_mul(gate_up)
    with use_backend("triton"):
        got = ops.silu_mul(gate_up)
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_static_quant_when_values_are_ties_or_huge_expect_even_codes_and_clamps() -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, -128.5, 1e30, -1e30, float("inf"), -0.0, 1e-40]])
    with use_backend("triton"):
        codes = ops.static_quant(x, torch.ones(1), None, None, 8)
    assert codes.tolist() == [[-2, -2, 0, 0, 2, 2, 126, 127, -128, 127, -128, 127, 0, 0]]


def test_dynamic_quant_when_token_is_zero_expect_zero_codes_and_positive_scale() -> None:
    with use_backend("triton"):
        codes, scale = ops.dynamic_quant(torch.zeros(2, 40), 1.0, 8)
    assert not codes.any()
    assert bool((scale > 0).all())


def test_op_when_input_is_float64_expect_torch_and_a_report() -> None:
    case = draw(3, 40)
    with use_backend("triton"):
        codes = ops.static_quant(case.x.double(), case.multiplier, None, None, 8)
    assert torch.equal(codes, ops.static_quant(case.x, case.multiplier, None, None, 8))
    assert any("float64" in reason for reason in backends.reports("static_quant"))


def test_quotient_when_fused_multiply_adds_are_exact_expect_the_rounded_division() -> None:
    """The three steps of `common.quotient`, with float64 for what a GPU keeps inside a fused multiply-add."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(400, 1, generator=generator) * torch.logspace(-11, 4, 400)[:, None] + 1e-12
    values = torch.randn(400, 5000, generator=generator) * 50 * scale
    values[:, ::2] = (torch.randint(-128, 128, (400, 2500), generator=generator) + 0.5) * scale  # ties, or next to them
    reciprocal = 1 / scale
    first = values * reciprocal
    rest = (values.double() - scale.double() * first.double()).float()
    quotient = (first.double() + rest.double() * reciprocal.double()).float()
    assert torch.equal(quotient, values / scale)
    assert not torch.equal(first, values / scale)
