"""The Triton GEMM on tiles, in the interpreter: the torch reference, bit for bit in float32 and float16."""

import itertools

import pytest
import torch

from mergequant import ops
from mergequant.ops.backends import use_backend
from mergequant.ops.tiles import interleave_rows, tile_weight

SHAPES = [(1, 64, 128), (3, 72, 130), (17, 200, 192), (33, 8, 1040), (130, 136, 256)]  # tokens, outputs, width


def operands(tokens: int, outputs: int, width: int, weight_bits: int, extras: bool):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(tokens + outputs + width)
    half = 1 << (weight_bits - 1)
    codes = torch.randint(-128, 128, (tokens, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-half, half, (outputs, width), generator=generator, dtype=torch.int8)
    codes[0], weight[0] = -128, -half
    scale = (torch.rand(outputs, generator=generator) + 0.5) * 8 / (73.9 * half * 0.577 * width**0.5)
    token_scale = torch.rand((tokens, 1), generator=generator) + 0.5
    bias = torch.randn(outputs, generator=generator)
    return codes, weight, scale, token_scale if extras else None, bias if extras else None


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("tokens", "outputs", "width"), SHAPES)
def test_linear_when_interpreted_expect_the_reference(tokens: int, outputs: int, width: int, weight_bits: int) -> None:
    for extras, dtype in itertools.product((False, True), (torch.float32, torch.float16)):
        codes, weight, *rest = operands(tokens, outputs, width, weight_bits, extras)
        arguments = (codes, tile_weight(weight, weight_bits), *rest, weight_bits, dtype)
        with use_backend("torch"):
            expected = ops.tiled_linear(*arguments)
        assert float(expected.float().std()) > 1
        with use_backend("triton"):
            result = ops.tiled_linear(*arguments)
        # The interpreter cuts off where a GPU rounds to nearest: half floats may be one unit in the last place less.
        if dtype == torch.float32:
            assert torch.equal(result, expected)
        torch.testing.assert_close(result.float(), expected.float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "outputs", "width"), [(3, 64, 128), (17, 208, 192), (130, 144, 256)])
def test_swiglu_when_interpreted_expect_the_reference(
    tokens: int, outputs: int, width: int, weight_bits: int, bits: int
) -> None:
    for extras in (False, True):
        codes, weight, scale, token_scale, bias = operands(tokens, outputs, width, weight_bits, extras)
        weight = interleave_rows(weight[: outputs // 2], weight[outputs // 2 :])
        gate_scale, up_scale = scale[: outputs // 2] / 4, scale[outputs // 2 :] * (1.6 if bits == 8 else 0.1)
        scales = interleave_rows(gate_scale, up_scale)
        arguments = (codes, tile_weight(weight, weight_bits), scales, token_scale, bias, weight_bits, bits)
        with use_backend("torch"):
            expected = ops.tiled_swiglu_quant(*arguments).int()
        with use_backend("triton"):
            result = ops.tiled_swiglu_quant(*arguments).int()
        assert float(expected.float().std()) > (1 << (bits - 1)) / 8
        assert int((result - expected).abs().max()) <= 1
        assert float((result != expected).float().mean()) < 2e-3
