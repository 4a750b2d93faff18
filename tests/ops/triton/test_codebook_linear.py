"""The codebook kernel in the interpreter, against the reference."""

import sys
from pathlib import Path

import pytest
import torch

from mergequant import ops
from mergequant.grids import CodebookTensor
from mergequant.ops import backends
from mergequant.ops.backends import use_backend
from mergequant.ops.triton import codebook_linear as kernels

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_codebook_linear import arguments, mixed, part

CASES = {
    "mixed": mixed(),
    "v8": CodebookTensor((part(5, 96, 8, 8),), 40),
    "v12 residual": CodebookTensor((part(3, 64, 12, 12, 12, groups=4),), 31),
    "v8, 32 bits": CodebookTensor((part(2, 33, 8, 16, 16),), 16),
    "tables": CodebookTensor((part(70, 40, 1, 2, groups=40),), 70),
}


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_kernel_when_interpreted_expect_reference(label: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = CASES[label]
    monkeypatch.setattr(kernels, "TILE", 512)
    monkeypatch.setattr(kernels, "PROGRAMS", 24)  # so that some are split and others are not
    x = torch.randn(tokens, weight.width, generator=torch.Generator().manual_seed(5))
    bias = torch.randn(weight.outputs, generator=torch.Generator().manual_seed(6))
    with use_backend("triton"):
        given = ops.codebook_linear(x, **arguments(weight), bias=bias)
        again = ops.codebook_linear(x, **arguments(weight), bias=bias)
    assert torch.equal(given, again)
    torch.testing.assert_close(given, ops.codebook_linear(x, **arguments(weight), bias=bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("label", CASES)
def test_decode_when_interpreted_expect_the_bits_of_the_reference(label: str) -> None:
    weight = CASES[label]
    given = arguments(weight)
    found = kernels.decode(given["indices"], given["books"], given["layout"], weight.outputs, torch.float32)
    expected = torch.cat([own.decode(weight.outputs) for own in weight.parts], 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("label", ["v8", "mixed"])
def test_op_when_tokens_are_many_expect_decoded_weight_and_a_report(label: str) -> None:
    weight = CASES[label]
    x = torch.randn(3, weight.width)
    with use_backend("triton"):
        given = ops.codebook_linear(x, **arguments(weight), bias=None)
    torch.testing.assert_close(given, ops.codebook_linear(x, **arguments(weight), bias=None), rtol=1e-5, atol=1e-4)
    assert any("decoded weight" in reason for reason in backends.reports("codebook_linear"))


@pytest.mark.parametrize("columns", [1, 40, 4096, 11008])
@pytest.mark.parametrize("vector", [1, 4, 6, 8, 12])
def test_cut_when_any_shape_expect_every_column_once(columns: int, vector: int) -> None:
    rows, taken, splits = kernels._cut(columns, vector, 4096, 1)
    piece = -(-columns // splits)
    stretch = taken * -(-piece // taken)
    assert splits * stretch >= columns > (splits - 1) * stretch
    assert rows & (rows - 1) == taken & (taken - 1) == 0
