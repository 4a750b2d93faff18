"""The Triton versions of the cache ops in the interpreter: float16 and float32, small caches."""

from typing import Any

import pytest
import torch

from kv_cases import Case, plain_attention
from mergequant.ops.backends import use_backend
from mergequant.ops.kv_append import kv_append
from mergequant.ops.kv_attention import kv_attention, kv_read


def case(bits: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    sizes = {"batch": 2, "heads": 4, "key_heads": 2, "width": 64, "capacity": 128, "device": "cpu"}
    return Case(bits=bits, dtype=dtype, **(sizes | changes))


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {name: arguments[name].clone() for name in ("key_cache", "value_cache")}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("tokens", "lengths"), [(1, (0, 47)), (35, (30, 64))])
def test_kv_append_in_triton_expect_the_reference(
    tokens: int, lengths: tuple[int, int], bits: int, norms: bool
) -> None:
    own = case(bits)
    arguments = own.append_arguments(tokens, own.lengths(*lengths), norms)
    expected = copies(arguments)
    q, k = kv_append(**expected)
    with use_backend("triton"):
        got_q, got_k = kv_append(**arguments)
    for name, got, want in (("q", got_q, q), ("k", got_k, k)):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), name
    for name in ("key_cache", "value_cache"):
        # The norm's sum has an order of its own: last bits may differ, and codes at a tie.
        if norms and bits == 16:
            assert torch.allclose(arguments[name], expected[name], rtol=1e-6, atol=1e-6), name
        else:
            different = (arguments[name] != expected[name]).float().mean()
            assert float(different) <= (1e-3 if norms else 0.0), name


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("lengths", [(128, 1), (0, 70)])
def test_kv_attention_in_triton_expect_plain_attention(lengths: tuple[int, int], bits: int, prefix: int) -> None:
    own = case(bits)
    arguments = own.attention_arguments(own.lengths(*lengths), prefix)
    exact = plain_attention(own, arguments)
    for most in (1, 128):  # one part, and two or more that are combined
        with use_backend("triton"):
            got = kv_attention(**(arguments | {"most": most}))
        assert float((got.double() - exact).norm() / exact.norm()) < 1e-5
        assert bool((got[torch.tensor(lengths) == 0] == 0).all())


def test_kv_attention_in_triton_when_eight_queries_share_a_key_expect_codes_near_plain_attention() -> None:
    own = case(8, torch.float16, heads=8, key_heads=1, width=128)
    arguments = own.attention_arguments(own.lengths(100, 33), prefix=1, out_bits=8)
    exact = plain_attention(own, arguments) * arguments["out_multiplier"].double()
    for most in (1, 128):
        with use_backend("triton"):
            got = kv_attention(**(arguments | {"most": most}))
        off = (got.double() - exact.round().clamp(-128, 127)).abs()
        assert got.dtype == torch.int8
        assert float(off.max()) <= 1
        assert float((off > 0).double().mean()) < 0.05
        assert got.unique().numel() > 60


@pytest.mark.parametrize("tokens", [1, 40, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_kv_read_in_triton_expect_the_reference(bits: int, tokens: int) -> None:
    own = case(bits)
    keys, values = own.random_cache()
    arguments = (keys, values, own.key_scale, own.value_scale, tokens, bits, torch.float16)
    expected = kv_read(*arguments)
    with use_backend("triton"):
        got = kv_read(*arguments)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
