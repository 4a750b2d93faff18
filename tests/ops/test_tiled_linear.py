"""tiled_linear and tiled_swiglu_quant: their torch reference against int64 and float64, and every wrong argument."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.ops import backends
from mergequant.ops.tiles import interleave_rows, tile_weight

SHAPES = [(1, 2, 1), (1, 128, 64), (3, 18, 5), (17, 130, 72), (129, 46, 7), (0, 6, 4)]


def full_range(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize(("tokens", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_linear_when_scales_are_one_expect_exact_integers(
    tokens: int, width: int, outputs: int, weight_bits: int, out_dtype: torch.dtype
) -> None:
    codes, weight = full_range((tokens, width), 8), full_range((outputs, width), weight_bits, 1)
    result = ops.tiled_linear(
        codes, tile_weight(weight, weight_bits), torch.ones(outputs), None, None, weight_bits, out_dtype
    )
    assert result.dtype == out_dtype
    assert torch.equal(result.long(), codes.long() @ weight.long().t())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_linear_when_token_scales_and_bias_expect_int8_linear(
    leading: tuple[int, ...], weight_bits: int, bias_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, weight = full_range((*leading, 34), 8), full_range((9, 34), weight_bits, 1)
    scale = torch.rand(9, generator=generator) + 0.1
    token_scale = torch.rand((*leading, 1), generator=generator) + 0.1
    bias = torch.randn(9, generator=generator).to(bias_dtype)
    arguments = (scale, token_scale, bias)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = ops.tiled_linear(codes, tile_weight(weight, weight_bits), *arguments, weight_bits, dtype)
        assert torch.equal(result, ops.int8_linear(codes, weight, *arguments, dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("extras", [False, True])
def test_swiglu_when_codes_fill_the_range_expect_float64_formula(bits: int, weight_bits: int, extras: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    tokens, width, ffn = 37, 200, 72
    codes = full_range((tokens, width), 8)
    gate, up = full_range((ffn, width), weight_bits, 1), full_range((ffn, width), weight_bits, 2)
    spread = (0.33 if bits == 8 else 0.02) / (1 << (weight_bits - 1))  # of the results over the range of the codes
    gate_scale = (torch.rand(ffn, generator=generator) + 0.5) * 0.002 * 8 / (1 << (weight_bits - 1))
    up_scale = (torch.rand(ffn, generator=generator) + 0.5) * spread
    token_scale = torch.rand((tokens, 1), generator=generator) + 0.5 if extras else None
    gate_bias, up_bias = torch.randn(ffn, generator=generator), torch.randn(ffn, generator=generator)
    result = ops.tiled_swiglu_quant(
        codes,
        tile_weight(interleave_rows(gate, up), weight_bits),
        interleave_rows(gate_scale, up_scale),
        token_scale,
        interleave_rows(gate_bias, up_bias) if extras else None,
        weight_bits,
        bits,
    )
    tokens_by = 1.0 if token_scale is None else token_scale.double()
    g = (codes.double() @ gate.double().t()) * gate_scale.double() * tokens_by
    u = (codes.double() @ up.double().t()) * up_scale.double() * tokens_by
    if extras:
        g, u = g + gate_bias.double(), u + up_bias.double()
    half = 1 << (bits - 1)
    expected = (g / (1 + torch.exp(-g)) * u).round().clamp(-half, half - 1)
    assert result.dtype == torch.int8
    assert float(expected.std()) > half / 6
    assert 0 < float((expected == half - 1).double().mean()) < 0.3
    difference = (result.double() - expected).abs()
    assert float(difference.max()) <= 1
    assert float((difference > 0).double().mean()) < 2e-3


def test_linear_when_the_sum_is_the_largest_expect_no_overflow() -> None:
    width = 130_000
    codes, weight = torch.full((1, width), -128, dtype=torch.int8), torch.full((1, width), -128, dtype=torch.int8)
    result = ops.tiled_linear(codes, tile_weight(weight, 8), torch.ones(1), None, None, 8, torch.float64)
    assert int(result) == 128 * 128 * width
    wide = torch.zeros((1, 130_016), dtype=torch.int8)
    with pytest.raises(KernelError, match="exact up to 130000"):
        ops.tiled_linear(wide, tile_weight(wide, 8), torch.ones(1), None, None, 8, torch.float32)


def arguments() -> dict[str, Any]:
    return {
        "codes": full_range((3, 6), 8),
        "tiles": tile_weight(full_range((16, 6), 4, 1), 4),
        "weight_scale": torch.ones(16),
        "token_scale": torch.ones(3, 1),
        "bias": torch.zeros(16),
        "weight_bits": 4,
        "last": torch.float32,
    }


WRONG: list[tuple[str, Callable[[Any], Any], str]] = [
    ("codes", lambda codes: codes.float(), "codes"),
    ("codes", lambda codes: torch.zeros(3, 129, dtype=torch.int8), "tiles"),
    ("codes", lambda codes: torch.zeros(3, 0, dtype=torch.int8), "codes"),
    ("codes", lambda codes: torch.tensor(1, dtype=torch.int8), "codes"),
    ("tiles", lambda tiles: tiles.view(torch.int8), "tiles"),
    ("tiles", lambda tiles: tiles[:, :, :4095], "tiles"),
    ("tiles", lambda tiles: tiles.repeat(2, 1, 1), "tiles"),
    ("tiles", lambda tiles: tiles.repeat(1, 1, 2)[:, :, ::2], "contiguous"),
    ("weight_scale", lambda scale: scale.double(), "weight_scale"),
    ("weight_scale", lambda scale: torch.ones(80), "tiles"),
    ("weight_scale", lambda scale: scale[:, None], "weight_scale"),
    ("weight_scale", lambda scale: torch.ones(32)[::2], "contiguous"),
    ("token_scale", lambda scale: scale[:2], "token_scale"),
    ("token_scale", lambda scale: scale[:, 0], "token_scale"),
    ("token_scale", lambda scale: scale.half(), "token_scale"),
    ("bias", lambda bias: bias[:1], "bias"),
    ("bias", lambda bias: bias.int(), "bias"),
    ("weight_bits", lambda bits: 8, "tiles"),
    ("weight_bits", lambda bits: 5, "4 or 8"),
    ("last", lambda last: torch.int32 if last == torch.float32 else 9, "out_dtype|bits"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
@pytest.mark.parametrize("swiglu", [False, True])
def test_ops_when_an_argument_is_wrong_expect_error_that_names_it(case: int, swiglu: bool) -> None:
    name, spoil, word = WRONG[case]
    values = arguments()
    op = ops.tiled_linear
    if swiglu:
        op, values["last"] = ops.tiled_swiglu_quant, 8
    op(*values.values())  # right before it is spoilt
    values[name] = spoil(values[name])
    with pytest.raises(KernelError, match=word):
        op(*values.values())


def test_ops_when_a_tensor_lies_elsewhere_expect_error_that_names_it() -> None:
    module = import_module("mergequant.ops.tiled_linear")  # the function of this name hides the module
    with pytest.raises(KernelError, match="tiles is on meta, codes on cpu"):
        module.require_same_device("op", torch.zeros(1), bias=None, tiles=torch.zeros(1, device="meta"))


def test_swiglu_when_rows_do_not_fill_groups_expect_error() -> None:
    values = arguments()
    values |= {"weight_scale": torch.ones(24), "bias": None, "last": 8}
    with pytest.raises(KernelError, match="interleave_rows"):
        ops.tiled_swiglu_quant(*values.values())


def test_linear_when_the_kernels_do_not_write_the_dtype_expect_the_reference_and_a_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = arguments()
    expected = ops.tiled_linear(*values.values())
    said: list[str] = []
    monkeypatch.setattr(backends, "choose", lambda op, device: "cuda")
    monkeypatch.setattr(backends, "report_fallback", lambda op, reason: said.append(reason))
    assert torch.equal(ops.tiled_linear(*values.values()), expected)
    assert said == ["the CUDA kernels write bfloat16 and float16, not torch.float32"]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("with_extras", [False, True])
def test_ops_when_run_on_fake_tensors_expect_real_shape_and_dtype(swiglu: bool, with_extras: bool) -> None:
    values = arguments()
    values["codes"] = values["codes"].reshape(1, 3, 6)
    values["token_scale"] = values["token_scale"].reshape(1, 3, 1)
    values["last"] = torch.bfloat16
    if not with_extras:
        values["token_scale"] = values["bias"] = None
    op = ops.tiled_linear
    if swiglu:
        op, values["last"] = ops.tiled_swiglu_quant, 4
    real = op(*values.values())
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values.values()))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    torch.library.opcheck(op.overload, tuple(values.values()))
