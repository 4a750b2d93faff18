"""`add_rmsnorm_quant` and `add_rmsnorm`: the addition and then the norm, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elementwise_cases import EPS, assert_near_exact, draw, run
from mergequant import ops
from mergequant.errors import KernelError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [None, 300])
def test_add_rmsnorm_quant_when_fused_expect_addition_then_norm_bit_for_bit(
    dtype: torch.dtype, width: int | None
) -> None:
    case = draw(17, 256, dtype=dtype, width=width, shifted=True)
    codes, residual = run("add_rmsnorm_quant", case)
    total = case.residual + case.x
    assert total.dtype == dtype
    assert torch.equal(residual, total)
    assert torch.equal(codes, ops.rmsnorm_quant(total, case.multiplier, case.index, case.shift, EPS, 8))
    assert_near_exact("add_rmsnorm_quant", case, codes, share=1e-3)


def test_add_rmsnorm_quant_when_residual_is_wider_expect_it_to_keep_its_dtype() -> None:
    case = draw(3, 64)
    residual = case.residual.clone()
    ops.add_rmsnorm_quant(case.x.bfloat16(), residual, case.multiplier, None, None, EPS, 8)
    assert residual.dtype == torch.float32
    assert torch.equal(residual, case.residual + case.x.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rmsnorm_when_given_x_expect_norm_of_the_new_residual(dtype: torch.dtype) -> None:
    case = draw(9, 96, dtype=dtype)
    weight = (torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    residual = case.residual.clone()
    normed = ops.add_rmsnorm(case.x, residual, weight, EPS)
    assert torch.equal(residual, case.residual + case.x)
    exact = residual.double() / (residual.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_add_rmsnorm_when_given_no_x_expect_residual_untouched() -> None:
    residual = draw(4, 32).residual
    before = residual.clone()
    normed = ops.add_rmsnorm(None, residual, torch.ones(32), EPS)
    assert torch.equal(residual, before)
    assert torch.equal(normed, ops.add_rmsnorm(torch.zeros_like(residual), residual, torch.ones(32), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rmsnorm_when_given_a_bias_expect_it_added_before_the_only_rounding(dtype: torch.dtype) -> None:
    case = draw(9, 96, dtype=dtype)
    weight, bias = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5, torch.linspace(-50, 50, 96)
    residual = case.residual.clone()
    normed = ops.add_rmsnorm(case.x, residual, weight, EPS, bias)
    exact = residual.double() / (residual.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, (exact + bias.double()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


WRONG: list[tuple[str, Any]] = [
    ("x has shape", {"x": torch.ones(2, 16)}),
    ("x is", {"x": torch.ones(3, 16, dtype=torch.int32)}),
    ("residual is", {"residual": torch.ones(3, 16, dtype=torch.int8)}),
    ("strides", {"residual": torch.ones(16, 3).t()}),
    ("multiplier", {"multiplier": torch.ones(15)}),
    ("bits", {"bits": 1}),
]


@pytest.mark.parametrize(("words", "change"), WRONG)
def test_add_rmsnorm_quant_when_an_argument_is_wrong_expect_error_that_names_it(
    words: str, change: dict[str, Any]
) -> None:
    values: dict[str, Any] = {"x": torch.ones(3, 16), "residual": torch.ones(3, 16), "multiplier": torch.ones(16)}
    values |= {"index": None, "shift": None, "eps": EPS, "bits": 8} | change
    with pytest.raises(KernelError, match=words):
        ops.add_rmsnorm_quant(**values)


def test_add_rmsnorm_when_weight_is_wrong_expect_error_that_names_it() -> None:
    with pytest.raises(KernelError, match="weight has shape"):
        ops.add_rmsnorm(None, torch.ones(3, 16), torch.ones(8), EPS)
    with pytest.raises(KernelError, match="weight is"):
        ops.add_rmsnorm(None, torch.ones(3, 16), torch.ones(16, dtype=torch.int8), EPS)
    for bias in (torch.ones(8), torch.ones(16, dtype=torch.bfloat16)):
        with pytest.raises(KernelError, match="bias is"):
            ops.add_rmsnorm(None, torch.ones(3, 16), torch.ones(16), EPS, bias)


def test_ops_when_run_on_fake_tensors_expect_real_shapes_and_dtypes() -> None:
    case = draw(5, 12, dtype=torch.bfloat16, width=14, shifted=True)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.add_rmsnorm_quant, (case.x, case.residual, case.multiplier, case.index, case.shift, EPS, 8)),
        (ops.add_rmsnorm, (case.x, case.residual, torch.ones(12), EPS)),
        (ops.add_rmsnorm, (None, case.residual, torch.ones(12), EPS)),
    ]
    for op, values in cases:
        real = op(*(value.clone() if isinstance(value, Tensor) else value for value in values))
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in values))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        torch.library.opcheck(op.overload, values)
