"""Kronecker transforms and their quantizer, against the whole matrix in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.ops.dynamic_quant import quantize_tokens

SIZES = [(1, 1), (1, 7), (5, 8), (4, 13), (16, 32)]


def draw(left: int, right: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(left * 100 + right)
    x = torch.randn(3, 4, left * right, generator=generator).to(dtype)
    return x, *(torch.randn(size, size, generator=generator) for size in (left, right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_kronecker_transform_when_any_size_expect_product_with_the_whole_matrix(
    sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    x, left, right = draw(*sizes, dtype)
    for second, whole in ((right, right), (None, torch.eye(sizes[1]))):
        found = ops.kronecker_transform(x, left, second)
        expected = x.double() @ torch.kron(left.double(), whole.double())
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_kronecker_dynamic_quant_expect_the_two_ops_one_after_the_other(sizes: tuple[int, int], bits: int) -> None:
    x, left, right = draw(*sizes)
    for second in (right, None):
        codes, scale = ops.kronecker_dynamic_quant(x, left, second, 0.9, bits)
        expected = quantize_tokens(ops.kronecker_transform(x, left, second), 0.9, bits)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])


def test_kronecker_dynamic_quant_when_factors_are_identities_expect_dynamic_quant_bit_for_bit() -> None:
    x = draw(5, 8)[0]
    found = ops.kronecker_dynamic_quant(x, torch.eye(5), torch.eye(8), 1.0, 4)
    assert all(map(torch.equal, found, ops.dynamic_quant(x, 1.0, 4)))


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (torch.ones(5, 5), torch.ones(4, 4), "product must be the width 40"),
        (torch.ones(3, 3), None, "do not divide the width 40"),
        (torch.ones(5, 4), None, "square"),
        (torch.ones(5, 5, dtype=torch.int8), None, "left is"),
    ],
)
def test_ops_when_factors_do_not_fit_expect_error_that_says_so(left: Tensor, right: Tensor | None, words: str) -> None:
    for call in (
        lambda: ops.kronecker_transform(torch.ones(2, 40), left, right),
        lambda: ops.kronecker_dynamic_quant(torch.ones(2, 40), left, right, 1.0, 4),
    ):
        with pytest.raises(KernelError, match=words):
            call()


def test_ops_when_run_on_fake_tensors_expect_real_shapes_and_dtypes() -> None:
    x, left, right = draw(4, 6, torch.bfloat16)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.kronecker_transform, (x, left, right)),
        (ops.kronecker_dynamic_quant, (x, left, None, 0.9, 4)),
    ]
    for op, values in cases:
        real = op(*values)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in values))
        reals, fakes = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
        assert [(t.shape, t.dtype) for t in fakes] == [(t.shape, t.dtype) for t in reals]
        torch.library.opcheck(op.overload, values)
