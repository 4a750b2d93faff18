"""QuantLinear with two-level weights: one product on every path, tiles, state, and what a description may say."""

import copy

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import CheckpointError, KernelError
from mergequant.grids import TwoLevelQuantizer, TwoLevelTensor, pack_codes
from mergequant.nn import InputSpec, LinearSpec, QuantLinear, spec_from_dict

OUTPUTS, WIDTH = 70, 96
DYNAMIC = InputSpec("dynamic", WIDTH, WIDTH, 8)
SPEC = LinearSpec(OUTPUTS, DYNAMIC, group_size=16, bias=True, levels=2)


def weight(seed: int = 0, group_size: int | None = 16) -> TwoLevelTensor:
    drawn = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return TwoLevelQuantizer(group_size).encode(drawn)


def fill(layer: QuantLinear, made: TwoLevelTensor) -> QuantLinear:
    assert layer.group_scale is not None
    assert layer.group_zero is not None
    layer.weight_codes.copy_(pack_codes(made.codes, 4))
    layer.weight_scale.copy_(made.scale[:, 0])
    layer.group_scale.copy_(made.group_scale)
    layer.group_zero.copy_(made.group_zero)
    return layer


def entering(seed: int = 9) -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_forward_when_prepared_or_compiled_or_by_the_op_expect_the_same_bits() -> None:
    layer, made = fill(QuantLinear(SPEC), weight()), weight()
    x = entering()
    given = layer(x)
    codes, scale = ops.dynamic_quant(x, 1.0, 8)
    parts = layer.weight_codes, layer.group_scale, layer.group_zero
    assert torch.equal(given, ops.two_level_linear(codes, *parts, layer.weight_scale, scale, layer.bias, x.dtype))
    assert torch.equal(layer.decoded_weight(), made.decode())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager")(x), given)


def test_forward_when_group_parts_change_expect_a_new_product() -> None:
    layer = fill(QuantLinear(SPEC), weight())
    before = layer(entering())
    assert layer.group_scale is not None
    layer.group_scale[:, 0] = 1
    assert not torch.equal(layer(entering()), before)


def test_scale_rows_expect_outputs_to_follow() -> None:
    layer = fill(QuantLinear(SPEC), weight())
    before = layer(entering())
    layer.scale_rows(torch.full((20,), 4.0), 10, 30)
    after = layer(entering())
    torch.testing.assert_close(after[..., 10:30], 4 * before[..., 10:30])
    assert torch.equal(after[..., 30:], before[..., 30:])


def test_adopt_when_tiles_hold_the_middle_level_expect_same_product_and_the_stored_codes_back() -> None:
    layers = [fill(QuantLinear(SPEC), weight(seed)) for seed in (1, 2)]
    given = [layer(entering()) for layer in layers]
    states = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]
    assert SPEC.gemm_bits == 8
    tiles = ops.tile_weight(torch.cat([layer.integer_weight() for layer in layers]), SPEC.gemm_bits)
    for number, layer in enumerate(layers):
        layer.adopt(tiles, slice(number * OUTPUTS, (number + 1) * OUTPUTS))
        assert torch.equal(layer(entering()), given[number])
        state = layer.state_dict()
        assert state.keys() == states[number].keys()
        assert all(torch.equal(state[name], states[number][name]) for name in state)
    with pytest.raises(KernelError, match="other codes"):
        fill(QuantLinear(SPEC), weight(3)).adopt(tiles, slice(0, OUTPUTS))


def test_state_dict_when_loaded_expect_the_same_output_and_casts_to_leave_parts_alone() -> None:
    layer = fill(QuantLinear(SPEC), weight())
    again = QuantLinear(SPEC)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(entering()), layer(entering()))
    half = copy.deepcopy(layer).half()
    assert half.group_scale is not None
    assert half.group_zero is not None
    assert (half.group_scale.dtype, half.group_zero.dtype) == (torch.uint8, torch.int8)
    assert half.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("kind", ["codes", "static", "float"])
@pytest.mark.parametrize("group_size", [0, 16])
def test_layer_when_input_is_of_another_kind_expect_it_to_be_served(kind: str, group_size: int) -> None:
    spec = LinearSpec(OUTPUTS, InputSpec(kind, WIDTH, WIDTH, 8), group_size=group_size, levels=2)  # type: ignore[arg-type]
    assert spec_from_dict(spec.to_dict(), "here") == spec
    made = weight(group_size=group_size or None)
    layer = fill(QuantLinear(spec), made)
    x = torch.randint(-128, 128, (5, WIDTH), generator=torch.Generator().manual_seed(0)).float()
    given = layer(x.to(torch.int8) if kind == "codes" else x)
    torch.testing.assert_close(given.float(), x @ made.decode().t(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"levels": 3}, "levels"), ({"levels": 0}, "levels"), ({"weight_bits": 8}, "levels"), ({"group_size": 7}, "7")],
)
def test_from_dict_when_levels_make_no_sense_expect_error(change: dict[str, int], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        spec_from_dict({**SPEC.to_dict(), **change}, "here")
