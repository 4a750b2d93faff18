"""SwiGLU with and without quantization, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elementwise_cases import CLIP, assert_near_exact, draw, run
from mergequant import ops
from mergequant.errors import KernelError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_when_any_dtype_expect_float64_values(dtype: torch.dtype) -> None:
    gate_up = draw(7, 50, dtype=dtype).gate_up.reshape(7, 1, 100)
    gate, up = gate_up.double().chunk(2, -1)
    result = ops.silu_mul(gate_up)
    assert result.dtype == dtype
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(result.double(), gate * torch.sigmoid(gate) * up, rtol=tolerance, atol=tolerance)


def test_silu_mul_when_gate_is_far_below_zero_expect_zero_not_nan() -> None:
    assert ops.silu_mul(torch.tensor([[-200.0, 200.0, 3.0, 2.0]])).tolist() == [[0.0, 400.0]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [None, 300])
@pytest.mark.parametrize("one", [False, True])
def test_silu_mul_quant_when_any_multiplier_expect_float64_codes(bits: int, width: int | None, one: bool) -> None:
    case = draw(33, 256, bits, width=width, shifted=not one, one=one)
    assert_near_exact("silu_mul_quant", case, *run("silu_mul_quant", case), share=1e-3)


def test_silu_mul_quant_when_no_multiplier_expect_unit_steps() -> None:
    gate_up = 20 * draw(5, 64).gate_up
    codes = ops.silu_mul_quant(gate_up, None, None, None, 8)
    assert torch.equal(codes, ops.silu_mul_quant(gate_up, torch.ones(1), None, None, 8))
    assert codes.unique().numel() > 30


@pytest.mark.parametrize("bits", [4, 8])
def test_silu_mul_dynamic_quant_when_any_bits_expect_float64_codes_and_scales(bits: int) -> None:
    case = draw(33, 250, bits)
    codes, scale = run("silu_mul_dynamic_quant", case)
    assert_near_exact("silu_mul_dynamic_quant", case, codes, share=1e-3)
    gate, up = case.gate_up.double().chunk(2, -1)
    largest = (gate * torch.sigmoid(gate) * up).abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest * CLIP / (2 ** (bits - 1) - 1), rtol=1e-6, atol=0)


def test_ops_when_an_argument_is_wrong_expect_error_that_names_it() -> None:
    for op, rest in (
        (ops.silu_mul, ()),
        (ops.silu_mul_quant, (None, None, None, 8)),
        (ops.silu_mul_dynamic_quant, (1.0, 8)),
    ):
        with pytest.raises(KernelError, match="odd width of 7"):
            op(torch.ones(2, 7), *rest)
        with pytest.raises(KernelError, match="gate_up is"):
            op(torch.ones(2, 8, dtype=torch.int8), *rest)
    with pytest.raises(KernelError, match="multiplier has shape"):
        ops.silu_mul_quant(torch.ones(2, 8), torch.ones(8), None, None, 8)
    with pytest.raises(KernelError, match="clip_ratio"):
        ops.silu_mul_dynamic_quant(torch.ones(2, 8), 0.0, 8)


def test_ops_when_run_on_fake_tensors_expect_real_shapes_and_dtypes() -> None:
    case = draw(5, 12, dtype=torch.bfloat16, width=14, shifted=True)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.silu_mul, (case.gate_up,)),
        (ops.silu_mul_quant, (case.gate_up, case.multiplier, case.index, case.shift, 8)),
        (ops.silu_mul_quant, (case.gate_up, None, None, None, 8)),
        (ops.silu_mul_dynamic_quant, (case.gate_up, 0.9, 4)),
    ]
    for op, values in cases:
        real = op(*values)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in values))
        reals, fakes = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
        assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in reals]
        torch.library.opcheck(op.overload, values)
