"""Prefill attention against a plain float64 softmax, with and without a past, with and without shared key heads."""

import pytest
import torch
from torch import Tensor

from mergequant.runtime.attention import causal_attention, fast_kernels


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """float64 attention of the last queries over all keys."""
    shares, length, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (tensor.double().repeat_interleave(shares, 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    seen = torch.ones(length, total, dtype=torch.bool).tril(total - length)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("past", [0, 1, 3, 17, 70])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_equals_plain_softmax(past: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(past)
    length = 9
    query = torch.randn(2, 4, length, 16, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, past + length, 16, generator=generator)
    before = (key[:, :, :past], value[:, :, :past]) if past else None
    with fast_kernels():
        got = causal_attention(query, key[:, :, past:], value[:, :, past:], before, 0.3)
    torch.testing.assert_close(got.double(), plain(query, key, value, 0.3), rtol=1e-5, atol=1e-5)


def test_causal_attention_when_prompt_is_long_and_past_short_equals_plain_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 40, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, 42, 8, generator=generator)
    got = causal_attention(query, key[:, :, 2:], value[:, :, 2:], (key[:, :, :2], value[:, :, :2]), 1.0)
    torch.testing.assert_close(got.double(), plain(query, key, value, 1.0), rtol=1e-5, atol=1e-5)
