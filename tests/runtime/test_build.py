"""Parts that are built from modules compute what the modules compute, in as few GEMMs as their inputs allow."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.grids import pack_codes
from mergequant.nn import InputSpec, LinearSpec, NormSpec, QuantLinear, QuantNorm
from mergequant.runtime import build_mlp, build_norm, build_projection
from mergequant.runtime.parts import FloatNorm, FusedGate

WIDTH, FFN = 48, 24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int, outputs: int, source: InputSpec, bits: int = 4, bias: bool = False) -> QuantLinear:
    layer = QuantLinear(LinearSpec(outputs=outputs, input=source, weight_bits=bits, bias=bias))
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (outputs, source.width), generator=generator(seed), dtype=torch.int8)
    layer.weight_codes = pack_codes(codes, bits)
    layer.weight_scale = torch.rand(outputs, generator=generator(seed + 1)) * 0.01 + 0.001
    if bias:
        layer.bias = torch.randn(outputs, generator=generator(seed + 2)) * 0.1
    return layer


def source(kind: str, width: int = WIDTH, **options: Any) -> InputSpec:
    return InputSpec(kind=kind, in_width=width, width=width, **options)  # type: ignore[arg-type]


def static(layer: QuantLinear, seed: int, shift: bool = False) -> QuantLinear:
    assert layer.input_quantizer is not None
    count = layer.spec.input.width if layer.spec.input.per_channel else 1
    layer.input_quantizer.multiplier = torch.rand(count, generator=generator(seed)) * 20 + 20
    if shift:
        layer.input_quantizer.shift = torch.rand(layer.spec.input.width, generator=generator(seed + 1)) - 0.5
    return layer


def hidden(width: int = WIDTH) -> Tensor:
    return torch.randn(2, 5, width, generator=generator(9))


def codes() -> Tensor:
    return torch.randint(-128, 128, (2, 5, WIDTH), generator=generator(9), dtype=torch.int8)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_projection_when_codes_arrive_is_one_gemm(bits: int) -> None:
    layers = [linear(n, outputs, source("codes"), bits, n == 1) for n, outputs in enumerate((32, 16, 8))]
    want = torch.cat([layer(codes()) for layer in layers], -1)
    built = build_projection(layers)
    assert len(built.branches) == 1
    assert torch.equal(built(codes(), torch.float32), want)
    for layer, part in zip(layers, want.split((32, 16, 8), -1)):  # which read the tiles now
        assert torch.equal(layer(codes()), part)


def test_projection_when_inputs_are_dynamic_alike_is_one_gemm() -> None:
    layers = [linear(n, 16, source("dynamic", clip_ratio=0.9)) for n in range(3)]
    want = torch.cat([layer(hidden()) for layer in layers], -1)
    built = build_projection(layers)
    assert len(built.branches) == 1
    assert torch.equal(built(hidden(), torch.float32), want)


def test_mlp_when_inputs_are_reassembled_computes_the_same() -> None:
    def gathering(layer: QuantLinear, seed: int) -> QuantLinear:
        quantizer, spec = layer.input_quantizer, layer.spec.input
        assert quantizer is not None
        read = spec.width + sum(spec.merges)
        quantizer.index = torch.randint(0, spec.in_width, (read,), generator=generator(seed), dtype=torch.int32)
        return layer

    def reads(width: int) -> InputSpec:
        return source("dynamic", width, gathers=True, merges=(5, 2))

    gate, up = (gathering(linear(n, FFN, reads(WIDTH)), 3) for n in (0, 5))
    down = gathering(linear(7, 32, reads(FFN)), 4)
    want = _mlp(gate, up, down, hidden())
    assert len(build_projection([gate, up]).branches) == 1
    built = build_mlp(gate, up, down)
    assert torch.equal(built(hidden(), torch.float32), want)


@pytest.mark.parametrize("difference", ["clip", "step", "bits", "float", "weight_only"])
def test_projection_when_inputs_differ_keeps_layers_apart(difference: str) -> None:
    one = static(linear(0, 16, source("static")), 3) if difference == "step" else linear(0, 16, source("dynamic"))
    other: dict[str, nn.Module] = {
        "clip": linear(1, 16, source("dynamic", clip_ratio=0.5)),
        "step": static(linear(1, 16, source("static")), 5),
        "bits": linear(1, 16, source("dynamic"), bits=8),
        "float": nn.Linear(WIDTH, 16),
        "weight_only": linear(1, 16, source("float", rotation=ops.rotation(WIDTH).name)),
    }
    modules = [one, other[difference]]
    with torch.no_grad():
        want = torch.cat([module(hidden()) for module in modules], -1)
        built = build_projection(modules)
        assert len(built.branches) == 2
        assert built.quantizer is None
        assert torch.equal(built(hidden(), torch.float32), want)


def _mlp(gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    return down(nn.functional.silu(gate(x)) * up(x))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["codes", "dynamic"])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_when_down_only_scales_puts_everything_into_two_gemms(kind: str, per_channel: bool, bias: bool) -> None:
    gate, up = linear(0, FFN, source(kind), bias=bias), linear(5, FFN, source(kind))
    down = static(linear(7, 32, source("static", FFN, per_channel=per_channel)), 8)
    x = codes() if kind == "codes" else hidden() * 20
    want = _mlp(gate, up, down, x)
    built = build_mlp(gate, up, down)
    assert isinstance(built.gate_up, FusedGate)
    produced = built.gate_up(x).float()
    assert 5 < float(produced.std()) < 120  # else nothing would be compared
    off = (built(x, torch.float32) - want).norm() / want.norm()
    assert float(off) < 0.01  # the folded multiplier rounds an ulp differently; a code or two may flip
    for layer in (gate, up):
        assert layer(x).shape == (2, 5, FFN)
    assert torch.equal(_mlp(gate, up, down, x), want)


@pytest.mark.parametrize("how", ["rotated", "rotated dynamic", "dynamic", "shifted", "odd width", "float down"])
def test_mlp_when_down_asks_for_more_computes_the_same_apart(how: str) -> None:
    ffn = 20 if how == "odd width" else FFN
    gate, up = linear(0, ffn, source("codes")), linear(5, ffn, source("codes"))
    rotation = ops.rotation(ffn).name if how.startswith("rotated") else ""
    downs = {
        "rotated": lambda: static(linear(7, 32, source("static", ffn, rotation=rotation)), 8),
        "rotated dynamic": lambda: linear(7, 32, source("dynamic", ffn, rotation=rotation)),
        "dynamic": lambda: linear(7, 32, source("dynamic", ffn)),
        "shifted": lambda: static(linear(7, 32, source("static", ffn, shifts=True)), 8, shift=True),
        "odd width": lambda: static(linear(7, 32, source("static", ffn)), 8),
        "float down": lambda: nn.Linear(ffn, 32),
    }
    down = downs[how]()
    with torch.no_grad():
        want = _mlp(gate, up, down, codes())
        built = build_mlp(gate, up, down)
        assert not isinstance(built.gate_up, FusedGate)
        off = (built(codes(), torch.float32) - want).norm() / want.norm()
    assert float(off) < 0.01


def test_norm_adds_then_norms() -> None:
    module = QuantNorm(NormSpec(norm="rms", channels=WIDTH, width=WIDTH, bits=8, eps=1e-5))
    module.multiplier = torch.rand(WIDTH, generator=generator(0)) * 30 + 10
    plain = nn.RMSNorm(WIDTH, eps=1e-5)
    biased = QuantNorm(NormSpec(norm="rms", channels=WIDTH, width=WIDTH, bits=16, eps=1e-5, shifts=True))
    biased.shift = torch.linspace(-5, 5, WIDTH)
    x, residual = hidden(), hidden() * 2
    for whole in (module, plain, biased):
        part = build_norm(whole, 1e-5)
        assert isinstance(part, FloatNorm) == (whole is not module)
        stream = residual.clone()
        with torch.no_grad():
            torch.testing.assert_close(part(None, stream), whole(residual))
            assert torch.equal(stream, residual)
            torch.testing.assert_close(part(x, stream), whole(residual + x))
        assert torch.equal(stream, residual + x)
