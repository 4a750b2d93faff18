"""QuantLinear.adopt: weights that live in tiles which several layers share."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import container_bits, pack_codes
from mergequant.nn import InputSpec, LinearSpec, QuantLinear
from mergequant.nn.tiled_rows import TiledRows

WIDTH = 190  # fills no tile


def make_layer(outputs: int, weight_bits: int = 4, kind: str = "codes", seed: int = 0) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = QuantLinear(LinearSpec(outputs, InputSpec(kind, WIDTH, WIDTH, 8), weight_bits, bias=True))  # type: ignore[arg-type]
    low, high = -(1 << (weight_bits - 1)), (1 << (weight_bits - 1)) - 1
    layer.weight_codes.copy_(
        pack_codes(torch.randint(low, high + 1, (outputs, WIDTH), generator=generator), weight_bits)
    )
    layer.weight_scale.copy_(torch.rand(outputs, generator=generator) + 0.1)
    assert layer.bias is not None
    layer.bias.copy_(torch.randn(outputs, generator=generator))
    return layer


def weight_of(layer: QuantLinear) -> Tensor:
    return layer.integer_weight()


def joined(layers: list[QuantLinear]) -> tuple[Tensor, list[Tensor]]:
    """Tiles of layers row under row, and the rows of each."""
    sizes = [layer.spec.outputs for layer in layers]
    bits = container_bits(layers[0].spec.weight_bits)
    tiles = ops.tile_weight(torch.cat([weight_of(layer) for layer in layers]), bits)
    return tiles, list(torch.arange(sum(sizes)).split(sizes))


def interleaved(gate: QuantLinear, up: QuantLinear) -> tuple[Tensor, list[Tensor]]:
    """Tiles of gate and up in turn, and the rows of each."""
    count = gate.spec.outputs
    bits = container_bits(gate.spec.weight_bits)
    tiles = ops.tile_weight(ops.interleave_rows(weight_of(gate), weight_of(up)), bits)
    places = ops.interleave_rows(torch.arange(count), torch.arange(count, 2 * count)).argsort()
    return tiles, [places[:count], places[count:]]


def entering(rows: int = 5, seed: int = 9) -> Tensor:
    return torch.randint(-128, 128, (rows, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("weight_bits", [3, 4, 6, 8])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 24, 40), (70, 1, 200), (16, 16)])
@pytest.mark.parametrize("turns", [False, True])
def test_layer_when_its_weights_are_adopted_expect_the_same_outputs_and_tensors(
    weight_bits: int, sizes: tuple[int, ...], turns: bool
) -> None:
    if turns and (len(set(sizes)) > 1 or len(sizes) != 2):
        pytest.skip("gate and up are of one size")
    layers = [make_layer(size, weight_bits, seed=number) for number, size in enumerate(sizes)]
    twins = copy.deepcopy(layers)
    tiles, rows = interleaved(*layers) if turns else joined(layers)
    x = entering()
    for layer, twin, own in zip(layers, twins, rows):
        for adopt in (own, own.to(torch.int32)) if turns else (own, slice(int(own[0]), int(own[-1]) + 1)):
            layer.adopt(tiles, adopt)
            assert "weight_codes" not in dict(layer.named_buffers())
            assert torch.equal(layer(x), twin(x))
            assert torch.equal(layer.weight_codes, twin.weight_codes)
            assert torch.equal(layer.decoded_weight(), twin.decoded_weight())
            assert layer.state_dict().keys() == twin.state_dict().keys()
            assert all(torch.equal(layer.state_dict()[name], value) for name, value in twin.state_dict().items())


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_tiled_product_when_rows_lie_anywhere_expect_the_bits_of_the_layer(
    weight_bits: int, dtype: torch.dtype, with_tokens: bool
) -> None:
    """What a GPU computes with, here by the reference of `tiled_linear`."""
    token_scale = torch.rand(5, 1, generator=torch.Generator().manual_seed(3)) + 0.1 if with_tokens else None
    layers = [make_layer(size, weight_bits, seed=size) for size in (128, 40, 64, 100, 33)]
    gate, up = make_layer(72, weight_bits, seed=1), make_layer(72, weight_bits, seed=2)
    for group, (tiles, rows) in ((layers, joined(layers)), ([gate, up], interleaved(gate, up))):
        for layer, own in zip(group, rows):
            x = entering()
            scale, bias = layer.weight_scale, layer.bias
            expected = ops.int8_linear(x, weight_of(layer), scale, token_scale, bias, dtype)
            assert torch.equal(layer._tiled(x, token_scale, dtype), expected)  # by tiles of its own
            layer.adopt(tiles, own)
            assert torch.equal(layer._tiled(x, token_scale, dtype), expected)
            shared = layer._shared
            assert shared is not None
            assert shared.tiles.data_ptr() >= tiles.data_ptr()
            assert shared.tiles.untyped_storage().data_ptr() == tiles.untyped_storage().data_ptr()


def test_tiled_product_when_weights_change_expect_new_tiles() -> None:
    layer, x = make_layer(40), entering()
    layer._tiled(x, None, torch.float32)
    layer.weight_codes[3:5].zero_()
    expected = ops.int8_linear(x, weight_of(layer), layer.weight_scale, None, layer.bias, torch.float32)
    assert torch.equal(layer._tiled(x, None, torch.float32), expected)


@pytest.mark.parametrize("kind", ["codes", "dynamic"])
def test_layer_when_cast_after_adopting_expect_it_to_stay_in_the_tiles(kind: str) -> None:
    layer, twin = make_layer(64, kind=kind), make_layer(64, kind=kind)
    tiles, rows = joined([layer])
    layer.adopt(tiles, rows[0])
    model = nn.Sequential(layer).to(torch.bfloat16)
    twin.to(torch.bfloat16)
    x = entering() if kind == "codes" else entering().to(torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(x), twin(x))
    assert layer._shared is not None
    assert layer.weight_scale.dtype == torch.float32


def test_layer_when_moved_to_another_device_expect_it_to_own_its_codes_again() -> None:
    layers = [make_layer(72, seed=1), make_layer(72, seed=2)]
    for layer, rows in zip(layers, (places := interleaved(*layers))[1]):
        layer.adopt(places[0], rows)
    away = nn.ModuleList(layers).to("meta")
    assert [name for name, _ in away[0].named_buffers()] == ["weight_scale", "bias", "weight_codes"]
    assert away[0].weight_codes.shape == (72, WIDTH // 2)
    assert away[0].weight_codes.device.type == "meta"
    assert away[0]._shared is None


def test_layer_when_copied_or_pickled_after_a_call_expect_the_same_outputs() -> None:
    for adopted in (False, True):
        layer, x = make_layer(300), entering()
        if adopted:
            tiles, rows = joined([layer])
            layer.adopt(tiles, rows[0])
        expected = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert torch.equal(twin(x), expected)
            assert torch.equal(twin.weight_codes, layer.weight_codes)
    model = nn.ModuleList([make_layer(64, seed=1), make_layer(64, seed=2)])
    tiles, rows = joined(list(model))  # type: ignore[arg-type]
    for layer, own in zip(model, rows):
        layer.adopt(tiles, own)
    first, second = copy.deepcopy(model)
    assert first._shared.tiles.untyped_storage().data_ptr() != tiles.untyped_storage().data_ptr()
    assert first._shared.tiles.untyped_storage().data_ptr() == second._shared.tiles.untyped_storage().data_ptr()


def test_layer_when_state_is_loaded_into_adopted_weights_expect_error_that_says_what_to_do() -> None:
    layer, twin = make_layer(64), make_layer(64, seed=5)
    tiles, rows = joined([layer])
    layer.adopt(tiles, rows[0])
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"0\.weight_codes cannot be loaded.*load the model anew"):
            nn.Sequential(layer).load_state_dict(nn.Sequential(twin).state_dict(), assign=assign)
    with pytest.raises(KernelError, match="load the model anew"):
        layer.weight_codes = twin.weight_codes
    fresh = make_layer(64, seed=7)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(entering()), layer(entering()))


def test_layer_when_compiled_expect_one_graph_and_the_same_result() -> None:
    layer, x = make_layer(64), entering()
    expected = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    tiles, rows = joined([layer])
    layer.adopt(tiles, rows[0])
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


WRONG: list[tuple[str, Any, Any]] = [
    ("other codes", lambda tiles: tiles, slice(1, 65)),
    ("other codes", lambda tiles: torch.roll(tiles, 1, -1), slice(0, 64)),
    ("64 places", lambda tiles: tiles, slice(0, 63)),
    ("64 places", lambda tiles: tiles, slice(100, 164)),
    ("64 places", lambda tiles: tiles, torch.arange(64) - 1),
    ("uint8", lambda tiles: tiles.view(torch.int8), slice(0, 64)),
    ("uint8", lambda tiles: tiles[:, :1], slice(0, 64)),
    ("uint8", lambda tiles: tiles[0], slice(0, 64)),
    ("meta", lambda tiles: tiles.to("meta"), slice(0, 64)),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_adopt_when_the_tiles_are_not_of_this_layer_expect_error_and_nothing_changed(case: int) -> None:
    message, spoil, rows = WRONG[case]
    layers = [make_layer(64), make_layer(64, seed=1)]
    tiles, _ = joined(layers)
    before, x = layers[0].weight_codes, entering()
    expected = layers[0](x)
    with pytest.raises(KernelError, match=message):
        layers[0].adopt(spoil(tiles), rows)
    assert layers[0].weight_codes is before
    assert torch.equal(layers[0](x), expected)


def test_adopt_when_the_layer_is_weight_only_expect_error() -> None:
    layer = make_layer(64, kind="float")
    tiles, rows = joined([layer])
    with pytest.raises(KernelError, match="weight-only"):
        layer.adopt(tiles, rows[0])


def test_tiled_rows_when_only_some_tiles_are_needed_expect_no_more_kept() -> None:
    layers = [make_layer(100, seed=1), make_layer(60, seed=2), make_layer(200, seed=3)]
    tiles, rows = joined(layers)
    kept = TiledRows.of(tiles, rows[1], 60, WIDTH, 4)
    assert kept.tiles.shape[0] == 2  # rows 100 to 159: tiles 1 and 2
    assert kept.start == 36
    assert torch.equal(kept.codes(), weight_of(layers[1]))
