"""Rotation and quantization in one op, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elementwise_cases import CLIP, assert_near_exact, draw, run
from mergequant import ops
from mergequant.errors import KernelError

WIDTHS = [1, 3, 40, 64, 172, 704]


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_hadamard_quant_when_any_width_expect_float64_codes(channels: int, bits: int) -> None:
    for case in (draw(9, channels, bits, one=True), draw(9, channels, bits, width=channels + 4, shifted=True)):
        assert_near_exact("hadamard_quant", case, *run("hadamard_quant", case), share=1e-3)


@pytest.mark.parametrize("channels", WIDTHS)
def test_hadamard_dynamic_quant_when_any_width_expect_float64_codes_and_scales(channels: int) -> None:
    case = draw(9, channels)
    codes, scale = run("hadamard_dynamic_quant", case)
    assert_near_exact("hadamard_dynamic_quant", case, codes, share=1e-3)
    largest = ops.hadamard_transform(case.x.double()).abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest * CLIP / 127, rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels", WIDTHS)
def test_silu_mul_hadamard_ops_when_any_width_expect_float64_codes(channels: int) -> None:
    for case in (draw(9, channels, one=True), draw(9, channels, 4, width=channels + 4, shifted=True)):
        assert_near_exact("silu_mul_hadamard_quant", case, *run("silu_mul_hadamard_quant", case), share=1e-3)
    case = draw(9, channels)
    assert_near_exact(
        "silu_mul_hadamard_dynamic_quant", case, run("silu_mul_hadamard_dynamic_quant", case)[0], share=1e-3
    )


def test_ops_when_input_is_float64_expect_codes_of_the_float32_rotation() -> None:
    case = draw(9, 64)
    wide = ops.hadamard_quant(case.x.double(), case.multiplier, None, None, 8)
    assert (wide != run("hadamard_quant", case)[0]).float().mean() < 1e-2
    assert wide.dtype == torch.int8


def test_ops_when_an_argument_is_wrong_expect_error_that_names_it() -> None:
    with pytest.raises(KernelError, match="multiplier has shape"):
        ops.hadamard_quant(torch.ones(2, 8), torch.ones(7), None, None, 8)
    with pytest.raises(KernelError, match="x is"):
        ops.hadamard_dynamic_quant(torch.ones(2, 8, dtype=torch.int8), 1.0, 8)
    with pytest.raises(KernelError, match="bits"):
        ops.hadamard_dynamic_quant(torch.ones(2, 8), 1.0, 9)
    with pytest.raises(KernelError, match="odd width"):
        ops.silu_mul_hadamard_quant(torch.ones(2, 7), torch.ones(1), None, None, 8)


def test_ops_when_run_on_fake_tensors_expect_real_shapes_and_dtypes() -> None:
    case = draw(5, 12, dtype=torch.bfloat16, width=14, shifted=True)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.hadamard_quant, (case.x, case.multiplier, case.index, case.shift, 8)),
        (ops.hadamard_dynamic_quant, (case.x, 0.9, 4)),
        (ops.silu_mul_hadamard_quant, (case.gate_up, case.multiplier, case.index, case.shift, 8)),
        (ops.silu_mul_hadamard_dynamic_quant, (case.gate_up, 0.9, 4)),
    ]
    for op, values in cases:
        real = op(*values)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in values))
        reals, fakes = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
        assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in reals]
        torch.library.opcheck(op.overload, values)
