"""CodebookLinear: the bits of the solver, one product, true bits, state, and what a description may say."""

import copy
from typing import Any

import pytest
import torch

from mergequant.errors import CheckpointError, KernelError
from mergequant.grids import CodebookTensor, CodedColumns, Outliers
from mergequant.nn import CodebookLinear, CodebookSpec, InputSpec, PartSpec, build_module, spec_from_dict

OUTPUTS, WIDTH = 23, 40
FLOAT = InputSpec("float", WIDTH, WIDTH)
X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(9))
CASES = ("plain", "mixed")


def part(columns: int, vector: int, bits: int, residual_bits: int = 0, groups: int = 1) -> CodedColumns:
    generator = torch.Generator().manual_seed(columns)
    entries = (1 << bits) + (1 << residual_bits if residual_bits else 0)
    book = torch.randn(groups, entries, vector, generator=generator).half()
    symbols = torch.randint(0, 1 << bits + residual_bits, (-(-OUTPUTS // vector), columns), generator=generator)
    return CodedColumns(symbols, book, bits, residual_bits)


def weight_of(case: str) -> CodebookTensor:
    if case == "plain":
        return CodebookTensor((part(40, 4, 6),), OUTPUTS)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    values = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(2))
    outliers = Outliers.single(values, values > 2)
    return CodebookTensor((part(4, 2, 5), part(24, 6, 4, 3, 2), part(12, 1, 3, 0, 12)), OUTPUTS, order, outliers)


def layer_of(case: str) -> CodebookLinear:
    layer = CodebookLinear.of(weight_of(case), FLOAT, bias=True)
    assert layer.bias is not None
    layer.bias.copy_(torch.arange(OUTPUTS))
    return layer


@pytest.mark.parametrize("case", CASES)
def test_layer_expect_the_weight_of_the_solver_to_the_last_bit_and_its_product(case: str) -> None:
    layer, made = layer_of(case), weight_of(case)
    assert torch.equal(layer.decoded_weight(), made.decode())
    assert torch.equal(layer(X), torch.nn.functional.linear(X, made.decode(), layer.bias))
    half = layer(X.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(X), rtol=0.05, atol=0.1)
    assert "bits for" in repr(layer)


@pytest.mark.parametrize("case", CASES)
def test_layer_expect_as_many_stored_bits_as_the_tensor_counts(case: str) -> None:
    layer, made = layer_of(case), weight_of(case)
    stored = sum(8 * part.numel() * part.element_size() for name, part in layer.state_dict().items() if name != "bias")
    assert stored == made.stored_bits()


@pytest.mark.parametrize("case", CASES)
def test_layer_when_restored_or_copied_or_compiled_expect_the_same_bits(case: str) -> None:
    layer = layer_of(case)
    given = layer(X)
    again = build_module(spec_from_dict(layer.spec.to_dict(), "here"))
    assert isinstance(again, CodebookLinear)
    assert again.spec == layer.spec
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), given)
    half = copy.deepcopy(layer).half()
    assert torch.equal(half(X), given)  # casts leave what is stored alone
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager")(X), given)


def test_scale_rows_and_integer_weight_expect_errors_that_say_what_to_do() -> None:
    layer = layer_of("plain")
    with pytest.raises(KernelError, match="before codebooks are made"):
        layer.scale_rows(torch.ones(3), 0, 3)
    with pytest.raises(KernelError, match="decoded_weight"):
        layer.integer_weight()
    with pytest.raises(KernelError, match="multiplies floats"):
        layer.adopt(torch.zeros(1, dtype=torch.uint8), slice(0, OUTPUTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": 0}, "need outputs"),
        ({"outliers": -1}, "need outputs"),
        ({"input": {"kind": "dynamic", "in_width": WIDTH, "width": WIDTH}}, "float inputs, not dynamic"),
        ({"weight_bits": 3}, "weight_bits belongs to integer weights"),
        ({"group_size": 8}, "group_size belongs to integer weights"),
        ({"parts": []}, "list of descriptions"),
        ({"parts": [{"columns": 39, "vector": 4, "bits": 6}]}, "39 columns make no weight of 40"),
        ({"parts": [{"columns": 40, "vector": 0, "bits": 6}]}, r"parts\.0.*positive"),
        ({"parts": [{"columns": 40, "vector": 4, "bits": 6, "groups": 3}]}, "groups divide columns"),
        ({"parts": [{"columns": 40, "vector": 4, "bits": 17}]}, "at most 16 bits"),
        ({"parts": [{"columns": 40, "vector": 4, "bits": 6, "residual_bits": 17}]}, "at most 16 bits"),
        ({"parts": [{"columns": 40, "vector": 4}]}, "'bits' is missing"),
    ],
)
def test_spec_when_it_makes_no_layer_expect_error(change: dict[str, Any], message: str) -> None:
    good = CodebookSpec(OUTPUTS, FLOAT, parts=(PartSpec(WIDTH, 4, 6),)).to_dict()
    assert spec_from_dict(good, "here") == CodebookSpec(OUTPUTS, FLOAT, parts=(PartSpec(WIDTH, 4, 6),))
    with pytest.raises(CheckpointError, match=message):
        spec_from_dict({**good, **change}, "here")
