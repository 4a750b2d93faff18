"""two_level_linear: equal to int8_linear on the middle level, bit for bit, and every wrong argument."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import TwoLevelQuantizer, TwoLevelTensor, pack_codes

OUTPUTS, WIDTH, GROUP = 24, 64, 16


def weight() -> TwoLevelTensor:
    drawn = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(0))
    return TwoLevelQuantizer(GROUP).encode(drawn)


def arguments() -> dict[str, Any]:
    made = weight()
    generator = torch.Generator().manual_seed(1)
    return {
        "codes": torch.randint(-128, 128, (2, 5, WIDTH), generator=generator, dtype=torch.int8),
        "packed_weight": pack_codes(made.codes, 4),
        "group_scale": made.group_scale,
        "group_zero": made.group_zero,
        "weight_scale": made.scale[:, 0],
        "token_scale": torch.rand(2, 5, 1, generator=generator),
        "bias": torch.randn(OUTPUTS, generator=generator),
        "out_dtype": torch.float32,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_level_linear_expect_the_bits_of_int8_linear_and_the_value_of_float64(dtype: torch.dtype) -> None:
    values, made = {**arguments(), "out_dtype": dtype}, weight()
    found = ops.two_level_linear(*values.values())
    tail = [values[name] for name in ("weight_scale", "token_scale", "bias", "out_dtype")]
    assert torch.equal(found, ops.int8_linear(values["codes"], made.middle(), *tail))
    exact = values["codes"].double() @ made.decode().double().t() * values["token_scale"] + values["bias"]
    torch.testing.assert_close(found.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_two_level_linear_when_compiled_expect_one_graph_and_the_same_result() -> None:
    values = arguments()
    rest = list(values.values())[1:]
    compiled = torch.compile(lambda codes: ops.two_level_linear(codes, *rest), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values["codes"]), ops.two_level_linear(*values.values()))


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "signed words": ("packed_weight", lambda t: t.view(torch.int8), "uint8"),
    "a vector of words": ("packed_weight", lambda t: t[0], "outputs, width / 2"),
    "steps of another kind": ("group_scale", lambda t: t.to(torch.int32), "group_scale"),
    "steps of too few rows": ("group_scale", lambda t: t[1:], "group_scale"),
    "groups that divide nothing": ("group_scale", lambda t: t[:, :3].contiguous(), "group_scale"),
    "zeros of other groups": ("group_zero", lambda t: t[:, :2].contiguous(), "group_zero"),
    "unsigned zeros": ("group_zero", lambda t: t.view(torch.uint8), "group_zero"),
    "steps too large": ("group_scale", lambda t: torch.full_like(t, 255), "int8"),
    "a scale per group": ("weight_scale", lambda t: t[:, None].expand(-1, 4), "weight_scale"),
    "codes too narrow": ("codes", lambda t: t[..., 1:], "do not end in"),
    "float codes": ("codes", lambda t: t.float(), "codes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_two_level_linear_when_an_argument_is_wrong_expect_it_named(case: str) -> None:
    name, spoil, message = HOSTILE[case]
    values: dict[str, Any] = arguments()
    value: Tensor = values[name]
    with pytest.raises(KernelError, match=message):
        ops.two_level_linear(*{**values, name: spoil(value)}.values())
