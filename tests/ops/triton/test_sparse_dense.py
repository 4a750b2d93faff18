"""The Triton kernels of `sparse_dense_linear`, in the interpreter: the reference's sums, and its weight."""

from typing import Any

import pytest
import torch

from mergequant import ops
from mergequant.nn import SparseLinear
from mergequant.ops import backends
from mergequant.ops._weight_only import places_of
from mergequant.ops.backends import use_backend
from mergequant.ops.sparse_dense_linear import MOST_TOKENS
from mergequant.ops.triton import sparse_dense
from sparse_cases import WEIGHTS, WIDTH, layer_of


def given(case: str, bits: int) -> tuple[Any, ...]:
    layer: SparseLinear = layer_of(case, bits=bits)
    codes, scale, bits = layer._parts(bits)
    return (codes, scale, *layer._rest(), layer.bias, bits, layer.spec.tile)


@pytest.mark.parametrize("case", WEIGHTS)
def test_sparse_dense_linear_when_interpreted_expect_the_reference(case: str) -> None:
    arguments = given(case, 4)
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    with use_backend("torch"):
        expected = ops.sparse_dense_linear(x, *arguments)
    with use_backend("triton"):
        found = ops.sparse_dense_linear(x, *arguments)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("case", WEIGHTS)
def test_decode_when_interpreted_expect_the_bits_of_the_reference(case: str, bits: int) -> None:
    *parts, _, bits, tile = given(case, bits)
    order, places = parts[4], None
    if order is not None:
        places = places_of(order)
        assert torch.equal(places[order.long()], torch.arange(WIDTH))
    found = sparse_dense.decode(*parts[:4], places, *parts[5:], bits, tile, WIDTH, torch.float32)
    expected = ops.decode_sparse(*parts, bits, tile, WIDTH)
    assert torch.equal(found, expected if order is None else expected[:, order.long()])


def test_op_when_the_kernel_cannot_take_it_expect_the_decoded_weight_and_a_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_reported", {})
    arguments = given("bilevel ordered", 3)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    with use_backend("triton"):
        found = ops.sparse_dense_linear(x, *arguments)
        ops.sparse_dense_linear(x[:1, : MOST_TOKENS["triton"]], *arguments)
    torch.testing.assert_close(found, ops.sparse_dense_linear(x, *arguments), rtol=1e-4, atol=1e-4)
    told = backends.reports("sparse_dense_linear")
    assert any(f"more than {MOST_TOKENS['triton']} tokens" in report for report in told)
    assert any("codes of 4 bits, not 3" in report for report in told)
