"""What the kernels of the float baselines compute, in plain torch: the definition, and what runs on a CPU.

Shapes: T tokens in B sequences (T = B * steps), C channels, F of the feed-forward net, H query heads of D, and a cache
(B, KV heads, capacity, D). Arithmetic is float32, stored in the outputs' type. With fp8 outputs every row has a scale
of its own, max|row| / 448.
"""

import torch
from torch import Tensor

__all__ = ["NAMES", "add_norm", "decode_attention", "quantize_rows", "rope_append", "silu_mul"]

NAMES = {"norm": "torch add_norm", "rope": "torch rope_append", "silu": "torch silu_mul", "rows": "torch fp8_rows"}
FP8_MOST = 448.0


def add_norm(
    update: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor | None
) -> None:
    """residual (T, C) += update; out (>= T, C) = RMSNorm(residual) * weight (C,), the norm of the unrounded sum.

    With `scale` (>= T, 1) float32, out is fp8 and gets its rows' scales there.
    """
    x = residual.float()
    if update is not None:
        x = x + update.float()
        residual.copy_(x)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    _store(y, out, scale)


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """x (T, C) as fp8 rows with scales."""
    _store(x.float(), out, scale)


def silu_mul(gate_up: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """out (>= T, F) = silu(gate) * up of gate_up (T, 2F), gate first; fp8 with scales if `scale` is given."""
    gate, up = gate_up.float().chunk(2, -1)
    _store(gate / (1 + torch.exp(-gate)) * up, out, scale)


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    keys: Tensor, values: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys of qkv (T, (H + 2 KV) * D), write keys and values into the cache from slot `lengths` on.

    The slot is the position; pairs are (d, d + D/2). `norms`: float32 (D,) gains of RMSNorm over a query's and a key's
    channels, before the rotation.

    Returns:
        Queries (T, H, D).
    """
    sequences, kv_heads, _, width = keys.shape
    steps = qkv.shape[0] // sequences
    parts = qkv.view(sequences, steps, heads + 2 * kv_heads, width).float()
    query, key, value = parts.split([heads, kv_heads, kv_heads], 2)
    if norms is not None:
        query, key = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain for x, gain in zip((query, key), norms)
        )
    positions = lengths.long()[:, None] + torch.arange(steps, device=qkv.device)  # (B, steps)
    query, key = (_rotated(x, cos[positions][:, :, None], sin[positions][:, :, None]) for x in (query, key))
    row = torch.arange(sequences, device=qkv.device)[:, None]
    keys[row, :, positions] = key.to(keys.dtype)
    values[row, :, positions] = value.to(values.dtype)
    return query.to(qkv.dtype).reshape(sequences * steps, heads, width)


def decode_attention(queries: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """(B, H * D): queries (B, H, D) attend to the first `length` slots; H / KV neighbouring heads share a key head."""
    sequences, heads, width = queries.shape
    grouped = queries.view(sequences, keys.shape[1], -1, width).float()
    scores = grouped @ keys[:, :, :length].float().transpose(-1, -2) * width**-0.5
    out = scores.softmax(-1) @ values[:, :, :length].float()
    return out.to(queries.dtype).reshape(sequences, heads * width)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def _store(y: Tensor, out: Tensor, scale: Tensor | None) -> None:
    rows = y.shape[0]
    if scale is not None:
        step = y.abs().amax(-1, keepdim=True) / FP8_MOST + 1e-12
        scale[:rows] = step
        y = y / step
    out[:rows] = y.to(out.dtype)
