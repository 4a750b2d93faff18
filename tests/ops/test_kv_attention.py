"""kv_attention and kv_read, torch reference: against plain float64 attention over the decoded cache."""

from typing import Any

import pytest
import torch

from kv_cases import Case, decoded, plain_attention
from mergequant.errors import KernelError
from mergequant.ops import backends
from mergequant.ops.kv_attention import kv_attention, kv_read


def case(bits: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    sizes = {"batch": 3, "heads": 4, "key_heads": 2, "width": 64, "capacity": 128, "device": "cpu"}
    return Case(bits=bits, dtype=dtype, **(sizes | changes))


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("prefix", [0, 1, 3, 8])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("lengths", [(128, 1, 33), (0, 2, 64)])
def test_kv_attention_when_rows_differ_expect_plain_attention(lengths: tuple[int, ...], bits: int, prefix: int) -> None:
    own = case(bits)
    arguments = own.attention_arguments(own.lengths(*lengths), prefix)
    got = kv_attention(**arguments)
    assert got.shape == (3, 4 * 64)
    assert relative(got, plain_attention(own, arguments)) < 1e-6
    assert bool((got[torch.tensor(lengths) == 0] == 0).all())


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 1, 128), (6, 3, 96), (2, 2, 32)])
def test_kv_attention_when_heads_are_grouped_expect_plain_attention(heads: int, key_heads: int, width: int) -> None:
    own = case(4, heads=heads, key_heads=key_heads, width=width)
    arguments = own.attention_arguments(own.lengths(77, 100, 5))
    assert relative(kv_attention(**arguments), plain_attention(own, arguments)) < 1e-6


def test_kv_attention_when_most_is_too_small_expect_the_same_result() -> None:
    own = case(8)
    arguments = own.attention_arguments(own.lengths(128, 70, 9))
    assert torch.equal(kv_attention(**arguments), kv_attention(**(arguments | {"most": 1})))


def test_kv_attention_when_hidden_slots_hold_nan_expect_no_trace_of_them() -> None:
    own = case(16)
    arguments = own.attention_arguments(own.lengths(5, 128, 64))
    clean = kv_attention(**arguments)
    for name in ("key_cache", "value_cache"):
        arguments[name][0, :, 5:] = float("nan")
    assert torch.equal(kv_attention(**arguments), clean)


@pytest.mark.parametrize("out_bits", [4, 8])
def test_kv_attention_when_the_result_is_quantized_expect_codes_of_the_float_result(out_bits: int) -> None:
    own = case(8)
    arguments = own.attention_arguments(own.lengths(9, 128, 50), out_bits=out_bits)
    got = kv_attention(**arguments)
    exact = plain_attention(own, arguments) * arguments["out_multiplier"].double()
    expected = exact.round().clamp(-(2 ** (out_bits - 1)), 2 ** (out_bits - 1) - 1)
    assert got.dtype == torch.int8
    assert float((got != expected).float().mean()) < 1e-3
    assert got.unique().numel() > (15 if out_bits == 4 else 100)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kv_attention_when_no_kernel_takes_the_width_expect_the_reference_and_a_report(backend: str) -> None:
    own = case(8, width=96)
    arguments = own.attention_arguments(own.lengths(1, 9, 128))
    expected = kv_attention(**arguments)
    with backends.use_backend(backend):
        assert torch.equal(kv_attention(**arguments), expected)
    assert any("96" in reason and "torch" in reason for reason in backends.reports("kv_attention"))


def test_kv_attention_when_checked_by_torch_expect_a_sound_registration() -> None:
    own = case(4)
    for changes in ({}, {"prefix": 2, "out_bits": 8}):
        arguments = own.attention_arguments(own.lengths(1, 9, 128), **changes)
        torch.library.opcheck(kv_attention.overload, (), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 128])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_kv_read_when_compared_with_the_packers_expect_equal_floats(bits: int, tokens: int) -> None:
    own = case(bits)
    keys, values = own.random_cache()
    k, v = kv_read(keys, values, own.key_scale, own.value_scale, tokens, bits, torch.bfloat16)
    exact = decoded(own, keys, values)
    assert k.shape == v.shape == (3, 2, tokens, 64)
    for got, want in zip((k, v), exact):
        assert torch.equal(got, want[:, :, :tokens].float().to(torch.bfloat16))


def test_kv_read_when_checked_by_torch_expect_a_sound_registration() -> None:
    for bits in (4, 16):
        own = case(bits)
        keys, values = own.random_cache()
        arguments = (keys, values, own.key_scale, own.value_scale, 70, bits, torch.float32)
        torch.library.opcheck(kv_read.overload, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"most": 0}, "most is 0"),
        ({"lengths": torch.tensor([1, 129, 1], dtype=torch.int32)}, "outside 0..128"),
        ({"lengths": torch.tensor([1, 1], dtype=torch.int32)}, "lengths"),
        ({"q": torch.zeros(3, 4, 64, dtype=torch.int32)}, "q is torch.int32"),
        ({"q": torch.zeros(3, 3, 64)}, "multiple of 2 key heads"),
        ({"q": torch.zeros(3, 4, 32)}, "key_cache"),
        ({"prefix_key": torch.zeros(2, 1, 64)}, "go together"),
        ({"prefix_key": torch.zeros(2, 9, 64), "prefix_value": torch.zeros(2, 9, 64)}, "prefix_key"),
        ({"prefix_key": torch.zeros(2, 1, 64).half(), "prefix_value": torch.zeros(2, 1, 64).half()}, "prefix_key"),
        ({"prefix_key": torch.zeros(2, 1, 64), "prefix_value": torch.zeros(2, 2, 64)}, "differ"),
        ({"out_bits": 8}, "out_bits is 8"),
        ({"out_multiplier": torch.ones(256)}, "out_bits is 0"),
        ({"out_multiplier": torch.ones(3), "out_bits": 8}, "out_multiplier"),
        ({"key_scale": None}, "key_scale is missing"),
    ],
)
def test_kv_attention_when_an_argument_is_wrong_expect_error_that_names_it(
    changes: dict[str, Any], message: str
) -> None:
    own = case(4)
    arguments = own.attention_arguments(own.lengths(1, 50, 128))
    with pytest.raises(KernelError, match=message):
        kv_attention(**(arguments | changes))


def test_kv_read_when_arguments_are_wrong_expect_errors() -> None:
    own = case(4)
    keys, values = own.random_cache()
    with pytest.raises(KernelError, match="tokens is 129"):
        kv_read(keys, values, own.key_scale, own.value_scale, 129, 4, torch.float32)
    with pytest.raises(KernelError, match="dtype"):
        kv_read(keys, values, own.key_scale, own.value_scale, 1, 4, torch.int8)
