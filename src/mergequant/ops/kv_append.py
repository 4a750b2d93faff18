"""`kv_append`: new tokens into the key and value cache. Rotary embedding, optional per-head norm, quantization.

    y = x * rsqrt(mean(x^2) + eps) * norm          queries and keys, where the model has such a norm (Qwen3)
    r[d] = y[d] cos[d] - y[d + D/2] sin[d]         queries and keys; d < D/2
    r[d + D/2] = y[d + D/2] cos[d] + y[d] sin[d]
    code = clamp(round(r * (1 / scale)))           keys; values from their own x

Token s of a row goes to slot lengths[row] + s, which is also its position. Everything is float32, one rounding per
operation in the order written, in every backend: codes are equal, except that the norm's sum may be taken in another
order. Keys are quantized from the float32 rotation, not from its rounding to the activations' dtype.
"""

import torch
from torch import Tensor

from mergequant.ops._kv import pick, require_caches, require_lengths, unserved
from mergequant.ops._register import register_mutating_op
from mergequant.ops._validate import require, require_float
from mergequant.ops.kv_layout import put_codes, quantize

__all__ = ["kv_append", "rotate_heads"]


@register_mutating_op("key_cache", "value_cache")
def kv_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    heads: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, and write keys and values of S new tokens into the caches, in place.

    Args:
        qkv: float (batch, S, (heads + 2 * key_heads) * D): query heads, key heads, value heads.
        cos, sin: float32 (positions, D / 2), positions >= capacity.
        lengths: int32 (batch,): slots that each row has filled already. Not changed.
        key_cache, value_cache: bits 16: (batch, key_heads, capacity, D) of qkv's dtype; else uint8
            (batch, key_heads, capacity, D * bits / 8), see `kv_layout`, capacity a multiple of 64.
        key_scale, value_scale: float32 (key_heads, D), positive: steps of the codes. Not used with 16 bits.
        query_norm, key_norm: optional float32 (D,): gains of a per-head RMSNorm before the rotation.
        eps: of those norms.
        heads: query heads.
        bits: 4 (codes -7..7), 8 (codes -127..127) or 16 (floats).

    Returns:
        q (batch, S, heads, D) and k (batch, S, key_heads, D), rotated, in qkv's dtype.

    Raises:
        KernelError: a dtype, shape or device that is not as above; on a CPU also tokens that do not fit the capacity.
            (On a GPU the lengths are not read; tokens beyond the capacity change no cache and give NaN.)
    """
    width = _check(
        qkv, cos, sin, lengths, key_cache, value_cache, key_scale, value_scale, query_norm, key_norm, heads, bits
    )
    key_heads = key_cache.shape[1]
    if qkv.shape[0] == 0 or qkv.shape[1] == 0:
        return _empty(qkv, heads, key_heads, width)
    backend = pick("kv_append", qkv.device, unserved(width, heads // key_heads, qkv.dtype, bits))
    if backend == "torch":
        return _reference(
            qkv,
            cos,
            sin,
            lengths,
            key_cache,
            value_cache,
            key_scale,
            value_scale,
            query_norm,
            key_norm,
            eps,
            heads,
            bits,
        )
    if backend == "cuda":
        from mergequant.ops.cuda.kv import append
    else:
        from mergequant.ops.triton.kv import append
    q, k = _empty(qkv, heads, key_heads, width)
    append(
        qkv.contiguous(),
        cos,
        sin,
        lengths,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        query_norm,
        key_norm,
        eps,
        bits,
        q,
        k,
    )
    return q, k


@kv_append.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    heads: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    key_heads = key_cache.shape[1]
    return _empty(qkv, heads, key_heads, qkv.shape[2] // (heads + 2 * key_heads))


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of float32 heads (..., D); cos and sin (..., D / 2). Channel d turns with channel d + D / 2."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _empty(qkv: Tensor, heads: int, key_heads: int, width: int) -> tuple[Tensor, Tensor]:
    rows, tokens = qkv.shape[:2]
    return qkv.new_empty((rows, tokens, heads, width)), qkv.new_empty((rows, tokens, key_heads, width))


def _reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    heads: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    rows, tokens = qkv.shape[:2]
    key_heads = key_cache.shape[1]
    parts = qkv.view(rows, tokens, heads + 2 * key_heads, -1).float()
    q, k, v = parts.split((heads, key_heads, key_heads), dim=2)
    slots = lengths.long()[:, None] + torch.arange(tokens, device=qkv.device)
    angles = cos[slots][:, :, None], sin[slots][:, :, None]
    q = rotate_heads(_normed(q, query_norm, eps), *angles)
    k = rotate_heads(_normed(k, key_norm, eps), *angles)
    for cache, new, scale, keys in ((key_cache, k, key_scale, True), (value_cache, v, value_scale, False)):
        if scale is None or bits == 16:
            place = slots[:, None, :, None].expand(rows, key_heads, tokens, new.shape[-1])
            cache.scatter_(2, place, new.transpose(1, 2).to(cache.dtype))
        else:
            put_codes(cache, quantize(new, scale, bits).transpose(1, 2), slots, bits, keys)
    return q.to(qkv.dtype), k.to(qkv.dtype)


def _normed(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return x if gain is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    heads: int,
    bits: int,
) -> int:
    op = "kv_append"
    require_float(op, "qkv", qkv)
    require(qkv.dim() == 3, lambda: f"{op}: qkv {tuple(qkv.shape)} is not (batch, tokens, width)")
    require(
        key_cache.dim() == 4, lambda: f"{op}: key_cache {tuple(key_cache.shape)} is not (batch, heads, capacity, width)"
    )
    key_heads, capacity = key_cache.shape[1:3]
    require(
        heads > 0 and key_heads > 0 and heads % key_heads == 0,
        lambda: f"{op}: {heads} query heads are no multiple of {key_heads} key heads",
    )
    width = qkv.shape[2] // (heads + 2 * key_heads)
    require(
        width > 0 and width % 2 == 0 and qkv.shape[2] == width * (heads + 2 * key_heads),
        lambda: f"{op}: qkv is {qkv.shape[2]} wide, which is not {heads} + 2 * {key_heads} heads of one even width",
    )
    require_caches(op, key_cache, value_cache, key_scale, value_scale, bits, width, qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            table.dim() == 2 and table.shape[0] >= capacity and table.shape[1] == width // 2,
            lambda: (
                f"{op}: {name} is {tuple(table.shape)}; pass (at least {capacity}, {width // 2}), a row per position"
            ),
        )
        require(
            table.dtype == torch.float32 and table.is_contiguous() and table.device == qkv.device,
            lambda: f"{op}: {name} is {table.dtype} on {table.device}; pass contiguous float32 on {qkv.device}",
        )
    for name, gain in (("query_norm", query_norm), ("key_norm", key_norm)):
        require(
            gain is None or (gain.shape == (width,) and gain.dtype == torch.float32 and gain.device == qkv.device),
            lambda: f"{op}: {name} must be float32 ({width},) on {qkv.device}, or None",
        )
    require_lengths(op, lengths, qkv.shape[0], qkv.device, capacity - qkv.shape[1])
    return width
