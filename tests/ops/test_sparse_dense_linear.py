"""sparse_dense_linear: the product of the decoded weight, fallbacks that are reported, and every wrong argument."""

from typing import Any

import pytest
import torch

from mergequant import ops
from mergequant.errors import KernelError
from sparse_cases import OUTPUTS, WIDTH, layer_of, weight_of


def arguments(case: str = "bilevel ordered") -> dict[str, Any]:
    layer = layer_of(case)
    codes, scale, bits = layer._parts(3)
    names = ("zero", "statistics", "order", "pointers", "columns", "values")
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    rest = dict(zip(names, layer._rest(), strict=True))
    return {"x": x, "codes": codes, "scale": scale, **rest, "bias": layer.bias, "bits": bits, "tile": layer.spec.tile}


def test_sparse_dense_linear_expect_the_product_of_the_decoded_weight() -> None:
    values = arguments()
    expected = values["x"].double() @ weight_of("bilevel ordered").decode().double().t() + values["bias"]
    torch.testing.assert_close(ops.sparse_dense_linear(*values.values()).double(), expected, rtol=1e-4, atol=1e-4)
    assert ops.sparse_dense_linear(*{**values, "x": values["x"][:0]}.values()).shape == (0, 5, OUTPUTS)


@pytest.mark.parametrize("case", ["bilevel ordered", "symmetric"])
def test_sparse_dense_linear_when_registered_expect_schema_and_fake_to_agree(case: str) -> None:
    values = arguments(case)
    torch.library.opcheck(ops.sparse_dense_linear.overload, tuple(values.values()))


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "integers in": ("x", lambda t: t.int(), "x is"),
    "inputs of another width": ("x", lambda t: t[..., :64], "bytes a row"),
    "signed codes": ("codes", lambda t: t.view(torch.int8), "codes must be uint8"),
    "scales of too few rows": ("scale", lambda t: t[1:], "scale"),
    "groups that divide nothing": ("scale", lambda t: t[:, :3].contiguous(), "scale"),
    "scales of another kind": ("scale", lambda t: t.half(), "scale is"),
    "zeros twice": ("zero", lambda t: torch.zeros(OUTPUTS, 8).half(), "zero"),
    "too few tiles": ("statistics", lambda t: t[:1], "statistics"),
    "an order of another kind": ("order", lambda t: t.int(), "order"),
    "pointers of too few rows": ("pointers", lambda t: t[1:], "pointers"),
    "columns of another kind": ("columns", lambda t: t.int(), "columns"),
    "columns without values": ("values", lambda t: None, "have columns and values"),
    "values of another count": ("values", lambda t: t[1:], "values"),
    "a bias of another width": ("bias", lambda t: t[1:], "bias"),
    "no bits": ("bits", lambda t: 1, "bits is 1"),
    "no tile": ("tile", lambda t: 0, "tile is 0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_sparse_dense_linear_when_an_argument_is_wrong_expect_it_named(case: str) -> None:
    name, spoil, message = HOSTILE[case]
    values = arguments()
    with pytest.raises(KernelError, match=message):
        ops.sparse_dense_linear(*{**values, name: spoil(values[name])}.values())
