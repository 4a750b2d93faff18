"""`kv_attention`: decode attention over a cache, one new token per row; `kv_read`: a cache as floats.

    out[h] = sum_s softmax_s(q[h] . key[s] * softmax_scale) value[s]        over the row's `lengths` slots

with key = code * key_scale and value = code * value_scale for quantized caches. The reference computes in float64 from
the decoded cache.
"""

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops._kv import pick, require_caches, require_lengths, unserved
from mergequant.ops._register import register_op
from mergequant.ops._validate import ACTIVATION_BITS, FLOAT_DTYPES, require, require_float, require_vector
from mergequant.ops.kv_layout import CAPACITY_MULTIPLE, unpack_keys, unpack_values

__all__ = ["MOST_PREFIX", "kv_attention", "kv_read", "reference"]

MOST_PREFIX = 8  # slots


@register_op
def kv_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    softmax_scale: float,
    bits: int,
    most: int,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    out_multiplier: Tensor | None = None,
    out_bits: int = 0,
    early: bool = False,
) -> Tensor:
    """Attention of one query token per row over the slots that its cache row holds.

    Args:
        q: float (batch, heads, D), rotated.
        key_cache, value_cache: as `kv_append` writes them, of `bits` bits; heads / key_heads is 1..8 for the kernels.
        lengths: int32 (batch,): visible slots of each row, the newest token among them. A row of 0 gives zeros.
        key_scale, value_scale: float32 (key_heads, D); not used with 16 bits.
        softmax_scale: factor of q . k, 1 / sqrt(D) in most models.
        bits: 4, 8 or 16.
        most: the host's upper bound of `lengths`; how the work is divided depends on it, the result does not.
        prefix_key, prefix_value: optional (key_heads, P, D) in q's dtype, P <= 8: slots 0..P-1 are attended from these
            floats (keys rotated) instead of from the cache.
        out_multiplier: float32 (heads * D,) or (1,), with `out_bits`: the result is quantized.
        out_bits: 0, or the width of the result's codes, 2..8.
        early: kernels may read `lengths`, and all slots but each row's newest, before the kernels ahead of this call on
            the stream have ended. True only if the last kernel that wrote `lengths` or the caches, apart from this
            token's `kv_append` with S = 1, was launched before that append: the decode loop. It saves the latency of
            the first memory access.

    Returns:
        (batch, heads * D) in q's dtype, or with `out_bits` int8 codes clamp(round(out * out_multiplier)).

    Raises:
        KernelError: a dtype, shape or device that is not as above; on a CPU also lengths beyond the capacity.
    """
    group = _check(
        q,
        key_cache,
        value_cache,
        lengths,
        key_scale,
        value_scale,
        bits,
        most,
        prefix_key,
        prefix_value,
        out_multiplier,
        out_bits,
    )
    out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=torch.int8 if out_bits else q.dtype)
    if q.shape[0] == 0:
        return out
    reasons = unserved(q.shape[2], group, q.dtype, bits)
    if bits == 16:
        reasons["cuda"] = ""  # float caches are the Triton kernel's: nothing has to be decoded
    backend = pick("kv_attention", q.device, reasons)
    if backend == "torch":
        result = reference(
            q, key_cache, value_cache, lengths, key_scale, value_scale, softmax_scale, bits, prefix_key, prefix_value
        )
        if out_bits:
            assert out_multiplier is not None  # checked above
            return IntegerGrid(out_bits).nearest(result.float() * out_multiplier).to(torch.int8)
        return result.to(q.dtype)
    given = (
        key_cache,
        value_cache,
        lengths,
        key_scale,
        value_scale,
        softmax_scale,
        bits,
        most,
        prefix_key,
        prefix_value,
        out_multiplier,
        out_bits,
    )
    if backend == "cuda":
        from mergequant.ops.cuda import kv

        kv.attend(q.contiguous(), *given, early, out)
    else:
        from mergequant.ops.triton import kv_attention as in_triton

        in_triton.attend(q.contiguous(), *given, out)
    return out


@kv_attention.register_fake
def _(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    softmax_scale: float,
    bits: int,
    most: int,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    out_multiplier: Tensor | None = None,
    out_bits: int = 0,
    early: bool = False,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=torch.int8 if out_bits else q.dtype)


@register_op
def kv_read(
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    tokens: int,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The first `tokens` slots of all rows as floats, for attention kernels that take floats (chunked prefill).

    Args:
        key_cache, value_cache, key_scale, value_scale, bits: as for `kv_attention`.
        tokens: 0..capacity.
        dtype: float dtype of the result; code * scale is rounded to it once.

    Returns:
        Keys and values, (batch, key_heads, tokens, D) each.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    width = require_caches("kv_read", key_cache, value_cache, key_scale, value_scale, bits)
    require(0 <= tokens <= key_cache.shape[2], lambda: f"kv_read: tokens is {tokens}, outside 0..{key_cache.shape[2]}")
    require(dtype in FLOAT_DTYPES, lambda: f"kv_read: dtype is {dtype}; pass one of {FLOAT_DTYPES}")
    if bits == 16 or key_scale is None or value_scale is None:
        return key_cache[:, :, :tokens].to(dtype, copy=True), value_cache[:, :, :tokens].to(dtype, copy=True)
    reasons = unserved(width, 1, dtype, bits)
    if pick("kv_read", key_cache.device, reasons) == "triton" and tokens and key_cache.shape[0]:
        from mergequant.ops.triton.kv import read

        return read(key_cache, value_cache, key_scale, value_scale, tokens, bits, dtype)
    k, v = _decoded(key_cache, value_cache, key_scale, value_scale, tokens, bits, width, torch.float32)
    return k.to(dtype), v.to(dtype)


@kv_read.register_fake
def _(
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    tokens: int,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows, heads, _, stored = key_cache.shape
    shape = (rows, heads, tokens, stored if bits == 16 else stored * 8 // bits)
    return key_cache.new_empty(shape, dtype=dtype), key_cache.new_empty(shape, dtype=dtype)


def _decoded(
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    tokens: int,
    bits: int,
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `tokens` slots, code * scale in `dtype`."""
    if bits == 16 or key_scale is None or value_scale is None:
        return key_cache[:, :, :tokens].to(dtype), value_cache[:, :, :tokens].to(dtype)
    whole = max(1, -(-tokens // CAPACITY_MULTIPLE)) * CAPACITY_MULTIPLE  # the packers take whole groups of slots
    keys = unpack_keys(key_cache[:, :, :whole], width, bits)[:, :, :tokens]
    values = unpack_values(value_cache[:, :, :whole], width, bits)[:, :, :tokens]
    return keys.to(dtype) * key_scale[:, None].to(dtype), values.to(dtype) * value_scale[:, None].to(dtype)


def reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    softmax_scale: float,
    bits: int,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    begins: Tensor | None = None,
) -> Tensor:
    """float64 (batch, heads * D). `begins`: bool (batch, key_heads), which rows begin with the prefix; None: all."""
    rows, heads, width = q.shape
    key_heads, capacity = key_cache.shape[1:3]
    tokens = max(1, int(lengths.max())) if lengths.device.type == "cpu" else capacity  # a GPU is not waited for
    k, v = _decoded(key_cache, value_cache, key_scale, value_scale, tokens, bits, width, torch.float64)
    if prefix_key is not None and prefix_value is not None:
        own = min(prefix_key.shape[1], tokens)
        first = [prefix[:, :own].double().expand(rows, -1, -1, -1) for prefix in (prefix_key, prefix_value)]
        if begins is not None:
            first = [torch.where(begins[..., None, None], x, cache[:, :, :own]) for x, cache in zip(first, (k, v))]
        k, v = (torch.cat((x, cache[:, :, own:]), dim=2) for x, cache in zip(first, (k, v)))
    score = q.double().view(rows, key_heads, heads // key_heads, width) @ k.transpose(-1, -2) * softmax_scale
    visible = (torch.arange(tokens, device=q.device) < lengths[:, None])[:, None, None]
    p = torch.softmax(score.masked_fill(~visible, float("-inf")), dim=-1)
    # Slots that are not visible may hold anything, NaN too; rows without visible slots have p = NaN and give zeros.
    p = p.masked_fill(~visible, 0.0)
    return (p @ v.masked_fill(~visible.transpose(-1, -2), 0.0)).reshape(rows, heads * width)


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    bits: int,
    most: int,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out_multiplier: Tensor | None,
    out_bits: int,
) -> int:
    op = "kv_attention"
    require_float(op, "q", q)
    require(q.dim() == 3, lambda: f"{op}: q {tuple(q.shape)} is not (batch, heads, width)")
    require_caches(op, key_cache, value_cache, key_scale, value_scale, bits, q.shape[2], q)
    key_heads, capacity = key_cache.shape[1:3]
    heads, width = q.shape[1:]
    require(heads % key_heads == 0, lambda: f"{op}: {heads} query heads are no multiple of {key_heads} key heads")
    require(most > 0, lambda: f"{op}: most is {most}; pass the largest length that can occur")
    require_lengths(op, lengths, q.shape[0], q.device, capacity)
    require((prefix_key is None) == (prefix_value is None), lambda: f"{op}: prefix_key and prefix_value go together")
    for name, prefix in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if prefix is None:
            continue
        require(
            prefix.dim() == 3
            and prefix.shape == (key_heads, prefix.shape[1], width)
            and prefix.shape[1] <= MOST_PREFIX,
            lambda: f"{op}: {name} is {tuple(prefix.shape)}; pass ({key_heads}, up to {MOST_PREFIX}, {width})",
        )
        require(
            prefix.dtype == q.dtype and prefix.device == q.device and prefix.is_contiguous(),
            lambda: f"{op}: {name} is {prefix.dtype} on {prefix.device}; pass contiguous {q.dtype} on {q.device}",
        )
    if prefix_key is not None and prefix_value is not None:
        require(prefix_key.shape == prefix_value.shape, lambda: f"{op}: prefix_key and prefix_value differ in shape")
    require(
        (out_bits == 0 and out_multiplier is None) or (out_bits in ACTIVATION_BITS and out_multiplier is not None),
        lambda: f"{op}: out_bits is {out_bits}; pass a width of {ACTIVATION_BITS} with out_multiplier, or 0 without",
    )
    require_vector(op, "out_multiplier", out_multiplier, heads * width, q, torch.float32)
    return heads // key_heads
