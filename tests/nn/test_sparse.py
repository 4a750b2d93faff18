"""SparseLinear: the bits of the solver, one product on every path, true bits, state, and what a description may say."""

import copy
from typing import Any

import pytest
import torch

from mergequant import ops
from mergequant.errors import CheckpointError, KernelError
from mergequant.nn import InputSpec, SparseLinear, SparseSpec, build_module, spec_from_dict
from sparse_cases import OUTPUTS, WEIGHTS, WIDTH, layer_of, weight_of

X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("case", WEIGHTS)
def test_layer_expect_the_weight_of_the_solver_to_the_last_bit_and_its_product(case: str, bits: int) -> None:
    layer, made = layer_of(case, bits), weight_of(case, bits)
    assert torch.equal(layer.decoded_weight(), made.decode())
    assert torch.equal(layer(X), torch.nn.functional.linear(X, made.decode(), layer.bias))
    half = layer(X.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(X), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("case", WEIGHTS)
def test_layer_expect_as_many_stored_bits_as_the_tensor_counts(case: str) -> None:
    layer, made = layer_of(case), weight_of(case)
    stored = sum(8 * part.numel() * part.element_size() for name, part in layer.state_dict().items() if name != "bias")
    assert stored == made.bits_per_element() * OUTPUTS * WIDTH  # 3-bit codes fill these rows to the last bit


@pytest.mark.parametrize("case", WEIGHTS)
def test_layer_when_restored_or_copied_or_compiled_expect_the_same_bits(case: str) -> None:
    layer = layer_of(case)
    given = layer(X)
    again = build_module(spec_from_dict(layer.spec.to_dict(), "here"))
    assert isinstance(again, SparseLinear)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), given)
    half = copy.deepcopy(layer).half()
    assert torch.equal(half(X), given)  # casts leave what is stored alone
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager")(X), given)


def test_layer_when_codes_are_widened_for_the_kernel_expect_the_same_weight() -> None:
    layer = layer_of("bilevel ordered")
    codes, scale, bits = layer._parts(4)
    assert bits == 4
    weight = ops.decode_sparse(codes, scale, *layer._rest(), bits, layer.spec.tile, WIDTH)
    assert torch.equal(weight, layer.decoded_weight())
    before = layer(X)
    layer.weight_codes[0] ^= 255
    assert not torch.equal(layer(X), before)


def test_scale_rows_and_integer_weight_expect_errors_that_say_what_to_do() -> None:
    with pytest.raises(KernelError, match="before its weights"):
        layer_of("bilevel").scale_rows(torch.ones(2), 0, 2)
    with pytest.raises(KernelError, match="decoded_weight"):
        layer_of("bilevel").integer_weight()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"outliers": -1}, "do not fit"),
        ({"outliers": OUTPUTS * WIDTH + 1}, "do not fit"),
        ({"whole_columns": True, "outliers": WIDTH + 1}, "do not fit"),
        ({"group_size": 7}, "does not divide"),
        ({"levels": 2}, "one level"),
        ({"zeros": "integer"}, "zeros of 16 bits"),
        ({"zeros": "none"}, "lacks zeros"),
        ({"tile": -1}, "tile"),
        ({"statistic_bits": 5}, "statistic_bits"),
        ({"weight_bits": 9}, "weight_bits"),
        ({"input": {"kind": "dynamic", "in_width": WIDTH, "width": WIDTH}}, "float inputs"),
    ],
)
def test_from_dict_when_fields_contradict_each_other_expect_error(change: dict[str, Any], word: str) -> None:
    spec = SparseSpec(OUTPUTS, InputSpec("float", WIDTH, WIDTH), 3, 16, zeros="float", outliers=3, tile=16)
    assert spec_from_dict(spec.to_dict(), "here") == spec
    with pytest.raises(CheckpointError, match=word):
        spec_from_dict({**spec.to_dict(), **change}, "here")
