"""Attention of many queries at once (prefill): torch's kernels, in the order in which they are fast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

__all__ = ["causal_attention", "fast_kernels"]

BY_SPEED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def fast_kernels() -> Iterator[None]:
    """Prefer cuDNN, then flash attention; what they do not take (float32, odd widths) goes to the next."""
    with sdpa_kernel(BY_SPEED, set_priority=True):
        yield


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:
    """Each query sees all of the past and the keys up to its own.

    Args:
        query: (B, heads, S, D).
        key, value: (B, kv_heads, S, D), of the same tokens.
        past: keys and values (B, kv_heads, T, D) of what came before, or None.
        scale: of the scores.

    Returns:
        (B, heads, S, D).
    """
    attention = nn.functional.scaled_dot_product_attention
    grouped = query.shape[1] != key.shape[1]
    if past is None:
        return attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    before, length = past[0].shape[2], query.shape[2]
    key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    if grouped:  # the kernels for a diagonal that ends in the lower right corner take no groups
        shares = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1)
    return attention(query, key, value, attn_mask=causal_lower_right(length, before + length), scale=scale)
