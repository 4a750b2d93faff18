"""codebook_linear: the reference, what it refuses, and what torch asks of an op."""

from typing import Any

import pytest
import torch

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import CodebookTensor, CodedColumns, Outliers


def part(vectors: int, columns: int, vector: int, bits: int, residual_bits: int = 0, groups: int = 1) -> CodedColumns:
    generator = torch.Generator().manual_seed(vectors + bits)
    entries = (1 << bits) + (1 << residual_bits if residual_bits else 0)
    book = torch.randn(groups, entries, vector, generator=generator).half()
    symbols = torch.randint(0, 1 << bits + residual_bits, (vectors, columns), generator=generator)
    return CodedColumns(symbols, book, bits, residual_bits)


def arguments(weight: CodebookTensor) -> dict[str, Any]:
    order, sparse = None if weight.order is None else weight.order.to(torch.int16), weight.outliers
    layout = [number for own in weight.parts for number in (own.columns, own.bits, own.residual_bits)]
    return {
        "indices": [own.packed() for own in weight.parts],
        "books": [own.book for own in weight.parts],
        "layout": layout,
        "order": order,
        "outliers": [] if sparse is None else [sparse.pointers, sparse.columns, sparse.values],
        "outputs": weight.outputs,
    }


def mixed() -> CodebookTensor:
    """Vectors, residual books, level tables and outliers in one weight of 23 x 40, in a stored order."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    values = torch.randn(23, 40, generator=torch.Generator().manual_seed(2))
    parts = part(6, 4, 4, 5), part(4, 24, 6, 4, 3, groups=2), part(23, 12, 1, 3, groups=12)
    return CodebookTensor(parts, 23, order, Outliers.single(values, values > 1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (0, 40)])
def test_linear_when_any_shape_expect_product_with_decoded_weight(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = mixed()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.arange(23).to(dtype)
    given = ops.codebook_linear(x, **arguments(weight), bias=bias)
    assert torch.equal(given, torch.nn.functional.linear(x, weight.decode().to(dtype), bias))
    assert torch.equal(ops.codebook_weight(**arguments(weight)), weight.decode())


def test_op_when_checked_by_torch_expect_schema_and_fake_versions_to_hold() -> None:
    given = arguments(mixed())
    x = torch.randn(3, 40)
    values = (
        x,
        given["indices"],
        given["books"],
        given["layout"],
        given["order"],
        given["outliers"],
        None,
        given["outputs"],
    )
    torch.library.opcheck(ops.codebook_linear.overload, values, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.codebook_weight.overload, (*values[1:6], values[7]), test_utils=("test_schema",))
    compiled = torch.compile(lambda x: ops.codebook_linear(x, *values[1:]) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.codebook_linear(*values) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 39)}, "39 channels, the weight 40"),
        ({"x": torch.zeros(3, 40, dtype=torch.int8)}, "x is torch.int8"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"outputs": 29}, "words"),
        ({"layout": [4, 5, 0]}, "numbers of layout"),
        ({"layout": [4, 4, 0, 24, 4, 3, 12, 3, 0]}, "book 0"),
        ({"outliers": [torch.zeros(23, dtype=torch.int64)]}, "outliers"),
        ({"order": torch.zeros(40, dtype=torch.int64)}, "order"),
        ({"books": [own.book.float() for own in mixed().parts]}, "float16"),
    ],
)
def test_linear_when_an_argument_does_not_fit_expect_error_that_names_it(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(3, 40), "bias": None, **arguments(mixed()), **change}
    with pytest.raises(KernelError, match=message):
        ops.codebook_linear(**given)
