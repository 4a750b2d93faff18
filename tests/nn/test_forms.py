"""Forms of integer weights: groups down columns, powers, and codes without a gap."""

from typing import Any

import pytest
import torch

from mergequant.errors import CheckpointError, KernelError
from mergequant.grids import IntegerGrid, PowerGrid, Quantizer, encode_across
from mergequant.nn import InputSpec, LinearSpec, QuantLinear

THREE = {"dense": True, "weight_bits": 3}
CODES = {"kind": "dynamic", "in_width": 24, "width": 24}


def layer(values: torch.Tensor, **form: Any) -> QuantLinear:
    return QuantLinear(LinearSpec(values.shape[0], InputSpec("float", values.shape[1], values.shape[1]), **form))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("width", [24, 13])
def test_quant_linear_when_dense_expect_the_same_weight_in_fewer_bytes(bits: int, width: int) -> None:
    weight = torch.randn(10, width, generator=torch.Generator().manual_seed(bits))
    made = Quantizer(IntegerGrid(bits)).encode(weight)
    module = layer(weight, weight_bits=bits, dense=True)
    module.weight_codes.copy_(module.pack(made.codes))
    module.weight_scale.copy_(made.scale[:, 0])
    assert module.weight_codes.shape == (10, -(-width * bits // 8))
    assert torch.equal(module.decoded_weight(), made.decode())
    again = layer(weight, weight_bits=bits, dense=True)
    again.load_state_dict(module.state_dict())
    x = torch.randn(3, width)
    assert torch.equal(again(x), module(x))
    torch.testing.assert_close(module(x), x @ made.decode().t())


@pytest.mark.parametrize("zeros", [False, True])
def test_quant_linear_when_groups_run_down_columns_expect_its_tensor_and_no_scaling_of_rows(zeros: bool) -> None:
    weight = torch.randn(12, 24, generator=torch.Generator().manual_seed(0))
    made = encode_across(weight, Quantizer(IntegerGrid(3), 4, zeros=zeros))
    module = layer(weight, weight_bits=3, group_size=4, across=True, zeros="integer" if zeros else "none")
    module.weight_codes.copy_(module.pack(made.codes))
    module.weight_scale.copy_(made.scale)
    if module.weight_zero is not None and made.zero is not None:
        module.weight_zero.copy_(made.zero)
    assert module.weight_scale.shape == (3, 24)
    assert torch.equal(module.decoded_weight(), made.decode())
    assert "across" in repr(module)
    with pytest.raises(KernelError, match="share scales"):
        module.scale_rows(torch.ones(2), 0, 2)


@pytest.mark.parametrize("exponent", [0.5, 0.62])
def test_quant_linear_when_codes_are_powers_expect_their_values(exponent: float) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    made = Quantizer(PowerGrid(4, exponent), 8).encode(weight)
    module = layer(weight, group_size=8, exponent=exponent)
    module.weight_codes.copy_(module.pack(made.codes))
    module.weight_scale.copy_(made.scale)
    assert torch.equal(module.decoded_weight(), made.decode())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form", [THREE, {"exponent": 0.5}, {**THREE, "weight_bits": 6}])
def test_quant_linear_when_inputs_are_integers_expect_every_path_to_agree(
    kind: Any, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = QuantLinear(LinearSpec(8, InputSpec(kind, 24, 24), **form))
    high = IntegerGrid(form.get("weight_bits", 4)).high
    codes = torch.randint(-high, high + 1, (8, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    module.weight_codes.copy_(module.pack(codes))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    prepared = module(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what a traced layer does
    torch.testing.assert_close(module(x), prepared)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"across": True}, "across needs"),
        ({"across": True, "group_size": 3}, "across needs"),
        ({"across": True, "group_size": 4, "input": CODES}, "need float"),
        ({"exponent": 0.0}, "exponent"),
        ({"exponent": 2.0}, "exponent"),
        ({"exponent": 0.5, "zeros": "integer"}, "neither zero points"),
        ({"exponent": 0.6, "input": CODES}, "int8 squares"),
        (
            {"exponent": 0.5, "weight_bits": 5, "input": CODES},
            "int8 squares",
        ),
        ({"dense": True, "levels": 2}, "dense belongs"),
    ],
)
def test_linear_spec_when_forms_contradict_each_other_expect_refusal(form: dict[str, Any], message: str) -> None:
    data = {"outputs": 8, "input": {"kind": "float", "in_width": 24, "width": 24}, **form}
    with pytest.raises(CheckpointError, match=message):
        LinearSpec.from_dict(data, "here")
