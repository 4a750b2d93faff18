"""The Triton versions of the ops on pages in the interpreter."""

from typing import Any

import pytest
import torch

from kv_cases import Case, Paged
from mergequant.ops.backends import use_backend
from mergequant.ops.kv_pages import kv_page_attention, kv_page_read


def case(bits: int, dtype: torch.dtype, **changes: Any) -> Case:
    sizes = {"batch": 3, "heads": 4, "key_heads": 2, "width": 64, "capacity": 128, "device": "cpu"}
    return Case(bits=bits, dtype=dtype, **(sizes | changes))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("page", [64, 128])
def test_page_attention_in_triton_expect_the_reference(page: int, bits: int, prefix: int) -> None:
    own = case(bits, torch.float32)
    paged = Paged(own, page)
    arguments = paged.attention_arguments(own.attention_arguments(own.lengths(128, 70, 0), prefix))
    paged.mark((0, 2))
    exact, got = torch.empty_like(arguments["q"]), torch.empty_like(arguments["q"])
    kv_page_attention(**arguments, out=exact)
    for most in (1, 128):  # one part, and two or more that are combined
        with use_backend("triton"):
            kv_page_attention(**(arguments | {"most": most}), out=got)
        assert float((got - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_page_read_in_triton_expect_the_reference(bits: int, prefix: bool) -> None:
    own = case(bits, torch.float16)
    paged = Paged(own, 64)
    paged.mark((0,))
    given = paged.read_arguments(past=(70, 64, 0), fresh=(3, 40, 5), prefix=prefix)
    wide = torch.cat((given["key"], given["value"]), 1)  # side by side, as behind one projection
    given |= {"key": wide[:, :2], "value": wide[:, 2:]}
    other = {name: given[name].clone() for name in ("out_key", "out_value")}
    kv_page_read(**given)
    with use_backend("triton"):
        kv_page_read(**(given | other))
    for name in ("out_key", "out_value"):
        assert torch.equal(other[name], given[name]), name
