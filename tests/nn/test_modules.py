"""QuantNorm, QuantLinear, InputQuantizer, PrefixStore."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mergequant import ops
from mergequant.errors import CheckpointError, InputError, KernelError
from mergequant.grids import pack_codes
from mergequant.nn import (
    InputSpec,
    KVScales,
    KVSpec,
    LinearSpec,
    NormSpec,
    PrefixSpec,
    PrefixStore,
    QuantLinear,
    QuantNorm,
)

CHANNELS, WIDTH, OUTPUTS, EPS = 40, 44, 12, 1e-6


def codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states whose channels differ in size, some of them outliers."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 67, CHANNELS, generator=generator)
    x[..., 5] *= 30
    return x.to(dtype)


def make_norm(norm: str = "rms", bits: int = 4) -> QuantNorm:
    generator = torch.Generator().manual_seed(0)
    module = QuantNorm(NormSpec(norm, CHANNELS, WIDTH, bits, EPS, gathers=True, shifts=True))  # type: ignore[arg-type]
    assert module.index is not None
    assert module.shift is not None
    module.multiplier.copy_((torch.rand(WIDTH, generator=generator) + 0.3) * 2 ** (bits - 1))
    module.index.copy_(torch.randint(0, CHANNELS, (WIDTH,), generator=generator))
    module.shift.copy_(torch.rand(WIDTH, generator=generator) - 0.5)
    return module


def make_linear(kind: str = "codes", weight_bits: int = 4, bias: bool = True, group_size: int = 0) -> QuantLinear:
    width = WIDTH if kind == "codes" else CHANNELS
    spec = InputSpec(kind, width, width, 4)  # type: ignore[arg-type]
    if kind == "static":
        spec = InputSpec("static", CHANNELS, WIDTH, 4, per_channel=True, gathers=True, shifts=True)
        width = WIDTH
    module = QuantLinear(LinearSpec(OUTPUTS, spec, weight_bits, group_size, bias))
    generator = torch.Generator().manual_seed(1)
    module.weight_codes.copy_(pack_codes(codes((OUTPUTS, width), weight_bits, 2), weight_bits))
    module.weight_scale.copy_(torch.rand(module.weight_scale.shape, generator=generator) + 0.1)
    if module.bias is not None:
        module.bias.copy_(torch.randn(OUTPUTS, generator=generator))
    if kind == "static":
        quantizer, norm = module.input_quantizer, make_norm()
        assert quantizer is not None
        for name in ("multiplier", "index", "shift"):
            getattr(quantizer, name).copy_(getattr(norm, name))
    return module


CASTS: list[tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = [
    (lambda module: module.half(), torch.float16),
    (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    (lambda module: module.bfloat16(), torch.bfloat16),
    (lambda module: module.double(), torch.float64),
    (lambda module: module.type(torch.float16), torch.float16),
    (lambda module: module.half().float(), torch.float32),
]


@pytest.mark.parametrize("kind", ["codes", "static", "dynamic", "float"])
@pytest.mark.parametrize("case", range(len(CASTS)))
def test_cast_when_model_changes_dtype_expect_buffers_kept_bit_for_bit_and_outputs_to_follow(
    kind: str, case: int
) -> None:
    cast, dtype = CASTS[case]
    model = nn.Sequential(make_linear(kind), nn.Linear(OUTPUTS, 2))
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    cast(model)
    linear = model[0]
    after = linear.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)
    assert model[1].weight.dtype == dtype
    assert linear.out_dtype == dtype
    x = codes((5, WIDTH), 4) if kind == "codes" else hidden(dtype)
    assert linear(x).dtype == dtype


def test_cast_when_norm_changes_dtype_expect_the_same_codes() -> None:
    norm, x = make_norm(), hidden()
    before = norm(x)
    assert torch.equal(norm.half()(x), before)
    assert norm.multiplier.dtype == torch.float32
    assert norm.index is not None
    assert norm.index.dtype == torch.int32


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_when_it_gives_floats_expect_gain_and_bias_rounded_once(norm: str, dtype: torch.dtype) -> None:
    module = QuantNorm(NormSpec(norm, CHANNELS, CHANNELS, 16, EPS, shifts=True))  # type: ignore[arg-type]
    assert module.shift is not None
    module.multiplier.copy_(torch.linspace(0.2, 3, CHANNELS))
    module.shift.copy_(torch.linspace(-40, 40, CHANNELS))
    x = hidden(dtype)
    wide = x.double() - (x.double().mean(-1, keepdim=True) if norm == "layer" else 0)
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    exact = exact * module.multiplier.double() + module.shift.double()
    given = module.to(dtype)(x)
    assert module.gives_floats
    assert given.dtype == dtype
    torch.testing.assert_close(given, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_when_compared_with_float64_expect_equal_codes_except_at_ties(
    norm: str, bits: int, dtype: torch.dtype
) -> None:
    module, x = make_norm(norm, bits), hidden(dtype)
    assert module.index is not None
    assert module.shift is not None
    wide = x.double()
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    scaled = normed[..., module.index.long()] * module.multiplier.double() + module.shift.double()
    expected = scaled.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    result = module(x)
    assert result.dtype == torch.int8
    assert result.unique().numel() >= 0.8 * 2**bits
    different = result.double() != expected
    ties = (scaled - scaled.floor() - 0.5).abs() < 1e-4
    assert not (different & ~ties).any()
    assert int(different.sum()) <= int(ties.sum()) <= 0.002 * ties.numel()


def integer_sums(x: Tensor, linear: QuantLinear) -> Tensor:
    packed = linear.weight_codes.long()
    low, high = packed & 15, packed >> 4
    weight = torch.stack((low, high), -1).flatten(-2)
    weight = weight - 16 * (weight > 7).long()
    return x.long() @ weight.t()


@pytest.mark.parametrize("kind", ["codes", "static", "dynamic"])
def test_linear_when_scales_are_one_expect_int64_sums_of_the_codes(kind: str) -> None:
    linear = make_linear(kind, bias=False)
    linear.weight_scale.fill_(1)
    if kind == "codes":
        entering = x = codes((3, 9, WIDTH), 8)
    else:
        x = hidden()
        assert linear.input_quantizer is not None
        entering, scale = linear.input_quantizer(x)
        if scale is not None:  # a power of two changes no digit
            x = x / scale
            x[..., 0] = 7.0 * 2
            x = x.round().clamp(-14, 14)
            entering, scale = linear.input_quantizer(x)
            assert torch.equal(scale, torch.full_like(scale, 2.0))
            assert torch.equal(linear(x).long(), 2 * integer_sums(entering, linear))
            return
    sums = integer_sums(entering, linear)
    assert sums.unique().numel() > 100
    assert torch.equal(linear(x), sums.float())


@pytest.mark.parametrize("kind", ["codes", "static"])
def test_linear_when_compared_with_fake_quantization_expect_equal_integers_and_one_epilogue(kind: str) -> None:
    linear = make_linear(kind, bias=False)
    if kind == "codes":
        entering = x = codes((3, 9, WIDTH), 4)
    else:
        x = hidden()
        assert linear.input_quantizer is not None
        entering = linear.input_quantizer(x)[0]
    # Float64 holds codes, decoded weights and sums without rounding before the scale is applied.
    unscaled = linear.decoded_weight().double() / linear.weight_scale.double()[:, None]
    assert float((unscaled - unscaled.round()).abs().max()) < 1e-5
    fake = entering.double() @ unscaled.round().t()
    assert torch.equal(fake, integer_sums(entering, linear).double())
    assert torch.equal(linear(x), fake.float() * linear.weight_scale)


@pytest.mark.parametrize("group_size", [0, 10])
@pytest.mark.parametrize("weight_bits", [2, 3, 4, 5, 8])
def test_weight_only_when_run_expect_product_with_decoded_weight(group_size: int, weight_bits: int) -> None:
    linear = make_linear("float", weight_bits, group_size=group_size)
    stored = codes((OUTPUTS, CHANNELS), weight_bits, 2)
    columns = torch.arange(CHANNELS) // (group_size or CHANNELS)
    weight = stored.double() * linear.weight_scale.reshape(OUTPUTS, -1).double()[:, columns]
    torch.testing.assert_close(linear.decoded_weight().double(), weight, rtol=1e-6, atol=0)
    x = hidden()
    assert linear.bias is not None
    expected = x.double() @ weight.t() + linear.bias.double()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dynamic", "float"])
def test_linear_when_its_input_is_scaled_expect_that_of_a_plain_layer_on_the_scaled_input(
    kind: str, dtype: torch.dtype
) -> None:
    plain = make_linear(kind, 8)
    spec = InputSpec(kind, CHANNELS, CHANNELS, 4, per_channel=True, shifts=True)  # type: ignore[arg-type]
    scaled = QuantLinear(LinearSpec(OUTPUTS, spec, 8, bias=True))
    generator = torch.Generator().manual_seed(4)
    multiplier, shift = torch.rand(CHANNELS, generator=generator) + 0.1, torch.randn(CHANNELS, generator=generator)
    own = {"input_quantizer.multiplier": multiplier, "input_quantizer.shift": shift}
    scaled.load_state_dict({**plain.state_dict(), **own})
    x = hidden(dtype)
    found = scaled(x)
    assert found.dtype == dtype
    wide = x.float() * multiplier + shift
    expected = plain(wide) if kind == "dynamic" else plain(wide.to(dtype))
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


def test_linear_when_weights_are_loaded_after_a_call_expect_new_results() -> None:
    for assign in (False, True):
        linear, x = make_linear(), codes((5, WIDTH), 4)
        first = linear(x)
        state = copy.deepcopy(linear.state_dict())
        state["weight_codes"] = pack_codes(codes((OUTPUTS, WIDTH), 4, 77), 4)
        linear.load_state_dict(state, assign=assign)
        fresh = make_linear()
        fresh.load_state_dict(state)
        assert not torch.equal(linear(x), first)
        assert torch.equal(linear(x), fresh(x))


def test_linear_when_a_buffer_is_replaced_or_written_after_a_call_expect_new_results() -> None:
    linear, x = make_linear(), codes((5, WIDTH), 4)
    first = linear(x)
    linear.weight_codes = pack_codes(codes((OUTPUTS, WIDTH), 4, 5), 4)
    second = linear(x)
    linear.weight_codes = pack_codes(codes((OUTPUTS, WIDTH), 4, 6), 4)  # another buffer of the same version
    assert not torch.equal(linear(x), second)
    second = linear(x)
    linear.weight_codes[0].zero_()
    third = linear(x)
    assert not torch.equal(first, second)
    assert linear.bias is not None
    assert torch.equal(third[:, 0], linear.bias[0].expand(5))
    assert torch.equal(third[:, 1:], second[:, 1:])


def test_linear_when_built_in_inference_mode_expect_it_to_run() -> None:
    with torch.inference_mode():
        linear = make_linear()
        result = linear(codes((5, WIDTH), 4))
    assert torch.equal(result, make_linear()(codes((5, WIDTH), 4)))


def test_linear_when_copied_expect_copies_independent() -> None:
    linear, x = make_linear(), codes((5, WIDTH), 4)
    first = linear(x)
    twin = copy.deepcopy(linear)
    twin.weight_codes.zero_()
    assert torch.equal(linear(x), first)
    assert twin.bias is not None
    assert torch.equal(twin(x), twin.bias.expand(5, -1))


@pytest.mark.parametrize("group_size", [0, 10])
def test_scale_rows_when_factors_are_powers_of_two_expect_outputs_scaled_exactly(group_size: int) -> None:
    linear = make_linear("float" if group_size else "codes", group_size=group_size)
    x = hidden() if group_size else codes((5, WIDTH), 4)
    before = linear(x)
    factor = torch.tensor([2.0, 0.25, 8.0])
    linear.scale_rows(factor, 4, 7)
    expected = before.clone()
    expected[..., 4:7] *= factor
    assert torch.equal(linear(x), expected)


def test_scale_rows_when_any_factor_expect_one_rounding_of_the_scales() -> None:
    linear, x = make_linear(bias=False), codes((5, WIDTH), 4)
    before, packed = linear.weight_scale.clone(), linear.weight_codes.clone()
    factor = torch.rand(OUTPUTS, generator=torch.Generator().manual_seed(4))
    linear.scale_rows(factor, 0, OUTPUTS)
    assert torch.equal(linear.weight_scale, before * factor)
    assert torch.equal(linear.weight_codes, packed)
    assert torch.equal(linear(x), integer_sums(x, linear).float() * (before * factor))


@pytest.mark.parametrize("kind", ["static", "dynamic", "float"])
def test_linear_when_rotation_is_not_this_releases_expect_refused(kind: str) -> None:
    right = InputSpec(kind, 40, 40, 4, ops.rotation(40).name)  # type: ignore[arg-type]
    QuantLinear(LinearSpec(4, right))
    wrong = InputSpec(kind, 40, 40, 4, "sylvester-1 x sylvester-64")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="sylvester-64"):
        QuantLinear(LinearSpec(4, wrong))


@pytest.mark.parametrize("kind", ["dynamic", "float"])
def test_linear_when_rotated_expect_product_of_turned_input_and_weight(kind: str) -> None:
    spec = InputSpec(kind, CHANNELS, CHANNELS, 8, ops.rotation(CHANNELS).name)  # type: ignore[arg-type]
    linear = QuantLinear(LinearSpec(OUTPUTS, spec, 8))
    linear.weight_codes.copy_(codes((OUTPUTS, CHANNELS), 8))
    weight = linear.decoded_weight().double() @ ops.rotation(CHANNELS).matrix().t()
    x = torch.randn(20, CHANNELS, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ weight.t()
    error = float((linear(x).double() - expected).norm() / expected.norm())
    assert error < (0.02 if kind == "dynamic" else 1e-6)


def test_linear_when_it_gets_floats_instead_of_codes_expect_error() -> None:
    with pytest.raises(KernelError, match="codes is"):
        make_linear()(torch.randn(3, WIDTH))


@pytest.mark.parametrize("kind", ["codes", "static"])
def test_compile_when_norm_and_linear_stand_together_expect_one_graph_and_equal_results(kind: str) -> None:
    model = nn.Sequential(make_norm(), make_linear()) if kind == "codes" else make_linear("static")
    x = hidden()
    eager = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), eager)
    torch._dynamo.reset()


def test_prefix_store_when_filled_expect_every_row_and_layer_of_a_cache_to_hold_it() -> None:
    store = PrefixStore(PrefixSpec((1, 5, 9), True, 2, 2, 4, 6, 8)).half()
    store.keys.copy_(torch.randn(store.keys.shape))
    store.values.copy_(torch.randn(store.values.shape))
    assert store.keys.dtype == torch.float32
    cache = DynamicCache()
    store.fill(cache, 3, torch.bfloat16)
    assert cache.get_seq_length() == 3
    for layer in range(2):
        keys, values = cache.layers[layer].keys, cache.layers[layer].values
        assert keys.shape == (3, 2, 3, 4)
        assert values.shape == (3, 2, 3, 6)
        for row in range(3):
            assert torch.equal(keys[row], store.keys[layer].bfloat16())
            assert torch.equal(values[row], store.values[layer].bfloat16())


def test_kv_scales_when_cast_expect_float32_steps_by_layer_and_bits() -> None:
    scales = KVScales(KVSpec(layers=3, kv_heads=2, key_width=4, value_width=6))
    assert set(scales.state_dict()) == {f"{part}_scale_{bits}" for part in ("key", "value") for bits in (8, 4)}
    for number, buffer in enumerate(scales.buffers()):
        buffer.copy_(torch.rand(buffer.shape) + number)
    before = {name: value.clone() for name, value in scales.state_dict().items()}
    scales.half()
    for bits in (8, 4):
        keys, values = scales.steps(1, bits)
        assert torch.equal(keys, before[f"key_scale_{bits}"][1])
        assert torch.equal(values, before[f"value_scale_{bits}"][1])
    with pytest.raises(InputError, match="8 or 4 bits, not 3"):
        scales.steps(0, 3)


def test_kv_scales_when_keys_are_rotated_expect_the_rotation_of_this_release_alone() -> None:
    name = ops.rotation(12).name
    assert f"keys rotated by {name}" in repr(KVScales(KVSpec(1, 2, 12, 6, name)))
    with pytest.raises(CheckpointError, match=f"12 channels by 'sylvester-12', this release by '{name}'"):
        KVScales(KVSpec(1, 2, 12, 6, "sylvester-12"))
