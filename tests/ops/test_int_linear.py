"""int8_linear and int4_linear against int64 arithmetic."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import pack_codes

product = import_module("mergequant.ops.int_matmul")  # the function of this name hides the module

SHAPES = [(1, 2, 1), (1, 64, 48), (3, 18, 5), (17, 130, 33), (129, 46, 7), (513, 8, 3), (0, 6, 4)]


def full_range(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    """Codes over the whole grid; tensors of some size hold both ends for certain."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    if codes.numel() > 8:
        codes.view(-1)[0], codes.view(-1)[-1] = low, high
    return codes


def reference(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.long() @ weight.long().t()


@pytest.mark.parametrize(("tokens", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_linear_when_scales_are_one_expect_exact_integers(
    tokens: int, width: int, outputs: int, weight_bits: int, out_dtype: torch.dtype
) -> None:
    codes, weight = full_range((tokens, width), 8), full_range((outputs, width), weight_bits, 1)
    scale = torch.ones(outputs)
    expected = reference(codes, weight)
    assert expected.numel() == 0 or int(expected.abs().max()) < 1 << 24  # else float32 could not hold them
    result = ops.int8_linear(codes, weight, scale, None, None, out_dtype)
    assert result.dtype == out_dtype
    assert torch.equal(result.long(), expected)
    assert torch.equal(result, expected.to(out_dtype))
    if weight_bits == 4:
        packed = ops.int4_linear(codes, pack_codes(weight, 4), scale, None, None, out_dtype)
        assert torch.equal(packed, result)


@pytest.mark.parametrize("width", [1, 3, 77])
def test_int8_linear_when_width_is_odd_expect_exact_integers(width: int) -> None:
    codes, weight = full_range((5, width), 8), full_range((3, width), 8, 1)
    result = ops.int8_linear(codes, weight, torch.ones(3), None, None, torch.float64)
    assert torch.equal(result.long(), reference(codes, weight))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (1100,)])
def test_linear_when_token_scales_and_bias_expect_float64_formula(leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, weight = full_range((*leading, 34), 8), full_range((9, 34), 4, 1)
    scale = torch.rand(9, generator=generator) + 0.1
    token_scale = torch.rand((*leading, 1), generator=generator) + 0.1
    bias = torch.randn(9, generator=generator)
    expected = reference(codes.reshape(-1, 34), weight).double().reshape(*leading, 9)
    expected = expected * scale.double() * token_scale.double() + bias.double()
    for result in (
        ops.int8_linear(codes, weight, scale, token_scale, bias, torch.float32),
        ops.int4_linear(codes, pack_codes(weight, 4), scale, token_scale, bias, torch.float32),
    ):
        assert result.shape == (*leading, 9)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-4)


def test_int_matmul_when_all_codes_are_extreme_expect_no_saturation() -> None:
    for left in (-128, 127):
        for right in (-128, 127):
            codes, weight = torch.full((3, 999), left, dtype=torch.int8), torch.full((5, 999), right, dtype=torch.int8)
            assert torch.equal(ops.int_matmul(codes, weight), torch.full((3, 5), 999 * left * right, dtype=torch.int32))


def test_int_matmul_when_the_product_of_this_cpu_saturates_expect_the_exact_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(product, "_cpu_product_is_exact", lambda: False)

    def forbidden(*_: Any) -> Tensor:
        raise RuntimeError("the saturating product was used")

    monkeypatch.setattr(torch, "_int_mm", forbidden)
    codes, weight = full_range((17, 130), 8), full_range((33, 130), 8, 1)
    assert torch.equal(product.int_matmul(codes, weight).long(), reference(codes, weight))
    assert "saturates" in product.backend(torch.device("cpu"))


@pytest.mark.parametrize(("tokens", "width", "outputs"), [(1, 5, 3), (16, 8, 8), (33, 20, 11), (40, 16, 24)])
def test_cuda_padding_when_sizes_are_odd_expect_exact_integers(tokens: int, width: int, outputs: int) -> None:
    codes, weight = full_range((tokens, width), 8), full_range((outputs, width), 8, 1)
    assert torch.equal(product._cuda_int_matmul(codes, weight).long(), reference(codes, weight))


def arguments() -> dict[str, Any]:
    return {
        "codes": full_range((3, 6), 8),
        "weight": full_range((5, 6), 4, 1),
        "weight_scale": torch.ones(5),
        "token_scale": torch.ones(3, 1),
        "bias": torch.zeros(5),
        "out_dtype": torch.float32,
    }


WRONG: list[tuple[str, Callable[[Any], Any]]] = [
    ("codes", lambda codes: codes.float()),
    ("codes", lambda codes: codes.int()),
    ("codes", lambda codes: codes[:, :4]),
    ("codes", lambda codes: torch.tensor(1, dtype=torch.int8)),
    ("weight", lambda weight: weight.float()),
    ("weight", lambda weight: weight[0]),
    ("weight", lambda weight: weight[None]),
    ("weight_scale", lambda scale: scale.double()),
    ("weight_scale", lambda scale: scale[:4]),
    ("weight_scale", lambda scale: scale[:1]),
    ("weight_scale", lambda scale: scale[:, None]),
    ("token_scale", lambda scale: scale[:2]),
    ("token_scale", lambda scale: scale[:, 0]),
    ("token_scale", lambda scale: scale.half()),
    ("bias", lambda bias: bias[:1]),
    ("bias", lambda bias: bias.int()),
    ("out_dtype", lambda dtype: torch.int32),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
@pytest.mark.parametrize("packed", [False, True])
def test_linear_when_an_argument_is_wrong_expect_error_that_names_it(case: int, packed: bool) -> None:
    name, spoil = WRONG[case]
    values = arguments()
    op = ops.int8_linear
    if packed:
        op, values["weight"] = ops.int4_linear, pack_codes(values["weight"], 4)
    op(*values.values())  # right before it is spoilt
    values[name] = spoil(values[name])
    with pytest.raises(KernelError, match=name):
        op(*values.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_extras", [False, True])
def test_linear_when_run_on_fake_tensors_expect_real_shape_and_dtype(packed: bool, with_extras: bool) -> None:
    values = arguments()
    values["codes"] = values["codes"].reshape(1, 3, 6)
    values["token_scale"] = values["token_scale"].reshape(1, 3, 1)
    values["out_dtype"] = torch.bfloat16
    if not with_extras:
        values["token_scale"] = values["bias"] = None
    op = ops.int8_linear
    if packed:
        op, values["weight"] = ops.int4_linear, pack_codes(values["weight"], 4)
    real = op(*values.values())
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values.values()))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert fake.stride() == real.stride()
    torch.library.opcheck(op.overload, tuple(values.values()))
