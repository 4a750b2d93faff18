"""The Triton kernel of `sparse_dense_linear`, in the interpreter: the reference's sums, in float32."""

import pytest
import torch

from mergequant import ops
from mergequant.nn import SparseLinear
from mergequant.ops.backends import use_backend
from sparse_cases import WEIGHTS, layer_of


@pytest.mark.parametrize("case", WEIGHTS)
def test_sparse_dense_linear_when_interpreted_expect_the_reference(case: str) -> None:
    layer: SparseLinear = layer_of(case, bits=4)
    codes, scale, bits = layer._parts(4)
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(1))
    arguments = (codes, scale, *layer._rest(), layer.bias, bits, layer.spec.tile)
    with use_backend("torch"):
        expected = ops.sparse_dense_linear(x, *arguments)
    with use_backend("triton"):
        found = ops.sparse_dense_linear(x, *arguments)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
