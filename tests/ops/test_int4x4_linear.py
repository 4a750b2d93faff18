"""int4x4_linear: its torch reference against int64, and every wrong argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import pack_codes


def four_bits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize(("tokens", "width", "outputs"), [(1, 2, 1), (3, 18, 5), (17, 130, 33), (0, 6, 4)])
def test_linear_when_scales_are_one_expect_exact_integers(tokens: int, width: int, outputs: int) -> None:
    codes, weight = four_bits((tokens, width)), four_bits((outputs, width), 1)
    packed = pack_codes(codes, 4), pack_codes(weight, 4)
    result = ops.int4x4_linear(*packed, torch.ones(outputs), None, None, torch.float64)
    assert torch.equal(result.long(), codes.long() @ weight.long().t())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_linear_when_token_scales_and_bias_expect_int8_linear(leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, weight = four_bits((*leading, 34)), four_bits((9, 34), 1)
    extras = (
        torch.rand(9, generator=generator),
        torch.rand((*leading, 1), generator=generator),
        torch.randn(9, generator=generator),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = ops.int4x4_linear(pack_codes(codes, 4), pack_codes(weight, 4), *extras, dtype)
        assert torch.equal(result, ops.int8_linear(codes, weight, *extras, dtype))


def arguments() -> dict[str, Any]:
    return {
        "packed_codes": pack_codes(four_bits((3, 6)), 4),
        "packed_weight": pack_codes(four_bits((5, 6), 1), 4),
        "weight_scale": torch.ones(5),
        "token_scale": torch.ones(3, 1),
        "bias": torch.zeros(5),
        "out_dtype": torch.float32,
    }


WRONG: list[tuple[str, Callable[[Any], Any]]] = [
    ("packed_codes", lambda codes: codes.view(torch.int8)),
    ("packed_codes", lambda codes: codes[:, :2]),
    ("packed_weight", lambda weight: weight.view(torch.int8)),
    ("packed_weight", lambda weight: weight[0]),
    ("packed_weight", lambda weight: weight[:0]),
    ("weight_scale", lambda scale: scale.double()),
    ("weight_scale", lambda scale: scale[:4]),
    ("weight_scale", lambda scale: torch.ones(10)[::2]),
    ("token_scale", lambda scale: scale[:2]),
    ("token_scale", lambda scale: scale.half()),
    ("bias", lambda bias: bias[:1]),
    ("bias", lambda bias: bias.int()),
    ("out_dtype", lambda dtype: torch.int32),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_linear_when_an_argument_is_wrong_expect_error_that_names_it(case: int) -> None:
    name, spoil = WRONG[case]
    values = arguments()
    ops.int4x4_linear(*values.values())  # right before it is spoilt
    values[name] = spoil(values[name])
    with pytest.raises(KernelError, match=name):
        ops.int4x4_linear(*values.values())


@pytest.mark.parametrize("with_extras", [False, True])
def test_linear_when_run_on_fake_tensors_expect_real_shape_and_dtype(with_extras: bool) -> None:
    values = arguments()
    values["out_dtype"] = torch.bfloat16
    if not with_extras:
        values["token_scale"] = values["bias"] = None
    real = ops.int4x4_linear(*values.values())
    with FakeTensorMode() as mode:
        fake = ops.int4x4_linear(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values.values()))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    torch.library.opcheck(ops.int4x4_linear.overload, tuple(values.values()))
