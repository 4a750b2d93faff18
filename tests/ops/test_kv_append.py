"""kv_append, torch reference: against a token-by-token computation through the packers, and errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kv_cases import Case
from mergequant.errors import KernelError
from mergequant.ops import kv_layout
from mergequant.ops.kv_append import kv_append


def case(bits: int, batch: int = 2, **changes: Any) -> Case:
    sizes = {"heads": 4, "key_heads": 2, "width": 64, "capacity": 128, "dtype": torch.bfloat16, "device": "cpu"}
    return Case(batch=batch, bits=bits, **(sizes | changes))


def by_hand(own: Case, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k in float32, and both caches after the call, one head of one token at a time."""
    qkv, heads, key_heads, width = arguments["qkv"].float(), own.heads, own.key_heads, own.width
    unpack = (kv_layout.unpack_keys, kv_layout.unpack_values)
    caches = [arguments["key_cache"].clone(), arguments["value_cache"].clone()]
    if own.bits < 16:
        caches = [take(cache, width, own.bits) for take, cache in zip(unpack, caches)]
    q = torch.zeros(own.batch, qkv.shape[1], heads, width)
    k = torch.zeros(own.batch, qkv.shape[1], key_heads, width)
    for row in range(own.batch):
        for token in range(qkv.shape[1]):
            slot = int(arguments["lengths"][row]) + token
            vectors = qkv[row, token].view(-1, width)
            for head in range(heads + key_heads):
                gain = arguments["query_norm" if head < heads else "key_norm"]
                x = vectors[head]
                if gain is not None:
                    x = x * torch.rsqrt(x.square().mean() + arguments["eps"]) * gain
                turned = torch.empty(width)
                for d in range(width // 2):
                    c, s = own.cos[slot, d], own.sin[slot, d]
                    turned[d] = x[d] * c - x[d + width // 2] * s
                    turned[d + width // 2] = x[d + width // 2] * c + x[d] * s
                if head < heads:
                    q[row, token, head] = turned
                else:
                    k[row, token, head - heads] = turned
            for head in range(key_heads):
                new = (k[row, token, head], vectors[heads + key_heads + head])
                for cache, x, scale in zip(caches, new, (own.key_scale, own.value_scale)):
                    limit = kv_layout.code_limit(own.bits) if own.bits < 16 else 0
                    cache[row, head, slot] = (x * (1 / scale[head])).round().clamp(-limit, limit) if limit else x
    if own.bits < 16:
        caches = [kv_layout.pack_keys(caches[0], own.bits), kv_layout.pack_values(caches[1], own.bits)]
    return q, k, caches[0], caches[1]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("tokens", "lengths"), [(1, (0, 37)), (19, (5, 70)), (40, (30, 0))])
def test_kv_append_when_compared_with_single_tokens_expect_equal_caches(
    tokens: int, lengths: tuple[int, int], bits: int, norms: bool
) -> None:
    own = case(bits)
    arguments = own.append_arguments(tokens, own.lengths(*lengths), norms)
    q, k, keys, values = by_hand(own, arguments)
    before = arguments["key_cache"].clone()
    got_q, got_k = kv_append(**arguments)
    assert torch.equal(got_q, q.to(torch.bfloat16))
    assert torch.equal(got_k, k.to(torch.bfloat16))
    assert torch.equal(arguments["key_cache"], keys)
    assert torch.equal(arguments["value_cache"], values)
    assert not torch.equal(arguments["key_cache"], before)


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_append_when_values_are_large_expect_codes_over_the_whole_symmetric_range(bits: int) -> None:
    own = case(bits, capacity=64)
    arguments = own.append_arguments(64, own.lengths(0, 0))
    arguments["qkv"] = arguments["qkv"] * 3
    kv_append(**arguments)
    limit = kv_layout.code_limit(bits)
    for codes in (
        kv_layout.unpack_keys(arguments["key_cache"], own.width, bits),
        kv_layout.unpack_values(arguments["value_cache"], own.width, bits),
    ):
        assert codes.unique().numel() == 2 * limit + 1
        assert int(codes.min()) == -limit


def test_kv_append_when_written_in_pieces_expect_the_cache_of_one_call() -> None:
    own = case(4, batch=1)
    whole = own.append_arguments(50, own.lengths(3))
    parts = whole | {name: whole[name].clone() for name in ("key_cache", "value_cache")}
    kv_append(**whole)
    for start, end in ((0, 1), (1, 30), (30, 31), (31, 50)):
        piece = whole["qkv"][:, start:end].contiguous()
        kv_append(**(parts | {"qkv": piece, "lengths": own.lengths(3 + start)}))
    assert torch.equal(whole["key_cache"], parts["key_cache"])
    assert torch.equal(whole["value_cache"], parts["value_cache"])


def test_kv_append_when_checked_by_torch_expect_a_sound_registration() -> None:
    own = case(8)
    arguments = own.append_arguments(2, own.lengths(1, 9))
    torch.library.opcheck(kv_append.overload, tuple(arguments.values()), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"heads": 3}, "multiple of 2 key heads"),
        ({"lengths": torch.tensor([0, 127], dtype=torch.int32)}, "enlarge the cache"),
        ({"lengths": torch.tensor([-1, 0], dtype=torch.int32)}, "lengths are -1"),
        ({"lengths": torch.tensor([0, 0])}, "int32"),
        ({"cos": torch.ones(127, 32)}, "cos"),
        ({"sin": torch.ones(128, 32, dtype=torch.float64)}, "sin"),
        ({"key_scale": None}, "key_scale is missing"),
        ({"value_scale": torch.ones(64)}, "value_scale"),
        ({"query_norm": torch.ones(32)}, "query_norm"),
        ({"key_cache": torch.zeros(2, 2, 128, 64, dtype=torch.int8)}, "key_cache"),
        ({"value_cache": torch.zeros(2, 2, 64, 32, dtype=torch.uint8)}, "value_cache"),
        ({"key_cache": torch.zeros(2, 2, 32, 128, dtype=torch.uint8).mT}, "contiguous"),
        ({"qkv": torch.zeros(2, 3, 512, dtype=torch.int8)}, "qkv"),
        ({"qkv": torch.zeros(2, 3, 500)}, "500 wide"),
        ({"qkv": torch.zeros(3, 3, 512)}, "rows"),
    ],
)
def test_kv_append_when_an_argument_is_wrong_expect_error_that_names_it(changes: dict[str, Any], message: str) -> None:
    own = case(4)
    arguments = own.append_arguments(3, own.lengths(0, 5))
    with pytest.raises(KernelError, match=message):
        kv_append(**(arguments | changes))
