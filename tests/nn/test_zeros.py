"""Weight-only layers with zero points: (code - zero) * scale."""

import pytest
import torch

from mergequant.errors import CheckpointError
from mergequant.grids import IntegerGrid, Quantizer, ZeroTensor, pack_codes
from mergequant.nn import InputSpec, LinearSpec, QuantLinear
from mergequant.nn.spec import ZeroKind
from mergequant.solvers import gptq

FLOAT = InputSpec("float", 24, 24)


@pytest.mark.parametrize(("group_size", "zeros"), [(0, "integer"), (6, "integer"), (6, "float")])
def test_forward_when_a_layer_has_zero_points_expect_the_decoded_weight(group_size: int, zeros: ZeroKind) -> None:
    torch.manual_seed(0)
    made = Quantizer(IntegerGrid(3), group_size or None, zeros=True).encode(torch.rand(5, 24) - 0.2)
    assert isinstance(made, ZeroTensor)
    zero = made.zero.half() + 0.25 if zeros == "float" else made.zero
    made = ZeroTensor(made.codes, made.scale, made.grid, zero)
    layer = QuantLinear(LinearSpec(5, FLOAT, 3, group_size, zeros=zeros))
    assert layer.weight_zero is not None
    layer.weight_codes.copy_(pack_codes(made.codes, 3))
    layer.weight_scale.copy_(made.scale.reshape(layer.weight_scale.shape))
    layer.weight_zero.copy_(zero.reshape(layer.weight_zero.shape))
    x = torch.randn(7, 24)
    assert torch.equal(layer(x), x @ made.decode().t())
    layer.scale_rows(torch.full((2,), 4.0), 1, 3)
    assert torch.equal(layer.decoded_weight()[1:3], made.rows(1, 3).decode() * 4)
    assert layer.half().weight_zero.dtype == zero.dtype
    assert f"{zeros} zeros" in repr(layer)


@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec(5, InputSpec("dynamic", 24, 24), zeros="integer"),
        LinearSpec(5, InputSpec("dynamic", 24, 24), levels=2, zeros="float"),
    ],
)
def test_spec_when_zeros_meet_integer_inputs_expect_refusal(spec: LinearSpec) -> None:
    with pytest.raises(CheckpointError, match="zeros need float inputs"):
        LinearSpec.from_dict(spec.to_dict(), "layer")


@pytest.mark.parametrize("static_groups", [True, False])
def test_gptq_when_groups_have_zeros_expect_less_error_than_nearest_and_than_symmetric(static_groups: bool) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(200, 24) @ torch.randn(24, 24)
    hessian, weight = tokens.t() @ tokens, torch.rand(16, 24).pow(2) - 0.1

    def error(made: torch.Tensor) -> float:
        return float(((made - weight) @ tokens.t()).square().sum())

    quantizer = Quantizer(IntegerGrid(3), 6, zeros=True)
    solution = gptq(weight, hessian, quantizer, activation_order=False, static_groups=static_groups)
    assert isinstance(solution.quantized, ZeroTensor)
    symmetric = gptq(weight, hessian, Quantizer(IntegerGrid(3), 6), activation_order=False)
    assert error(solution.quantized.decode()) < 0.7 * error(quantizer.encode(weight).decode())
    assert error(solution.quantized.decode()) < 0.7 * error(symmetric.quantized.decode())
