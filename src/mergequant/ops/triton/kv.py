"""Triton versions of `kv_append` and `kv_read`; the places of codes in quantized caches, for all kernels on them.

Code by code: for caches of floats, and for GPUs that the CUDA kernels are not written for.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mergequant.ops.kv_layout import code_limit
from mergequant.ops.triton.common import launch, round_to_code, wait_for_predecessor

__all__ = ["append", "codes_of", "is_marked", "key_place", "read", "value_place"]

SLOTS = 32  # of a program: the group in which 4-bit values share bytes


@triton.jit
def _place(word, half, lane, j, BITS: tl.constexpr):
    """Byte of a code and the shift of its bits there, from the word's number; `kv_layout._place`."""
    if BITS == 8:
        word = word * 2 + half
        half = half * 0
    return word // 4 * 512 + lane * 16 + word % 4 * 4 + j, half * 4


@triton.jit
def key_place(slot, channel, WIDTH: tl.constexpr, BITS: tl.constexpr):
    word = slot // 8 * (WIDTH // 32) + channel // 32
    return _place(word, channel % 32 // 16, slot % 8 * 4 + channel % 16 // 4, channel % 4, BITS)


@triton.jit
def value_place(slot, channel, WIDTH: tl.constexpr, BITS: tl.constexpr):
    word = slot // 32 * (WIDTH // 8) + channel // 8
    j = slot % 16 // 8 * 2 + slot % 2
    return _place(word, slot % 32 // 16, channel % 8 * 4 + slot % 8 // 2, j, BITS)


@triton.jit
def codes_of(byte, shift, BITS: tl.constexpr):
    """int32 codes from their bytes."""
    if BITS == 8:
        return byte.to(tl.int8, bitcast=True).to(tl.int32)
    nibble = (byte.to(tl.int32) >> shift) & 15
    return (nibble ^ 8) - 8  # sign extension


@triton.jit
def is_marked(byte, BITS: tl.constexpr):
    """Whether the first byte of a head's keys says that the first token is a stored one; `kv_layout.is_marked`."""
    return (byte & (2**BITS - 1)) == 2 ** (BITS - 1)


@triton.jit
def _quantized(x, scale, LIMIT: tl.constexpr):
    """int32 whose low byte is clamp(round(x * (1 / scale))); the reciprocal as IEEE rounds it."""
    return round_to_code(x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), -LIMIT, LIMIT)


@triton.jit
def _turned(source, inside, cosine, sine, gain, eps, WIDTH: tl.constexpr):
    """Two halves (slots, WIDTH / 2) of heads, normed where there is a gain, and rotated."""
    HALF: tl.constexpr = WIDTH // 2
    d = tl.arange(0, HALF)[None, :]
    low = tl.load(source + d, mask=inside[:, None], other=0.0).to(tl.float32)
    high = tl.load(source + HALF + d, mask=inside[:, None], other=0.0).to(tl.float32)
    if gain is not None:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / WIDTH
        factor = tl.rsqrt(mean + eps)[:, None]
        low = low * factor * tl.load(gain + d)
        high = high * factor * tl.load(gain + HALF + d)
    return low * cosine - high * sine, high * cosine + low * sine


@triton.jit
def _store_keys(cache, codes, slots, stored, first_channel, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes (slots, WIDTH / 2) of the channels from `first_channel` into the cache of one head."""
    HALF: tl.constexpr = WIDTH // 2
    if BITS == 8:
        channel = first_channel + tl.arange(0, HALF)
        byte, _ = key_place(slots[:, None], channel[None, :], WIDTH, BITS)
        tl.store(cache + byte, codes.to(tl.uint8), mask=stored[:, None])
    else:
        # A byte holds channels c and c + 16.
        steps = tl.reshape(codes, (codes.shape[0], HALF // 32, 2, 16))
        low, high = tl.split(tl.permute(steps, (0, 1, 3, 2)))
        step = tl.arange(0, HALF // 32)[:, None] * 32
        channel = first_channel + step + tl.arange(0, 16)[None, :]
        byte, _ = key_place(slots[:, None, None], channel[None, :, :], WIDTH, BITS)
        both = (low & 15) | ((high & 15) << 4)
        tl.store(cache + byte, both.to(tl.uint8), mask=stored[:, None, None])


@triton.jit
def _append(
    qkv,
    cosines,
    sines,
    lengths,
    keys,
    values,
    key_scale,
    value_scale,
    query_norm,
    key_norm,
    q,
    k,
    eps,
    tokens,
    capacity,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LIMIT: tl.constexpr,
    SLOTS: tl.constexpr,
    DECODE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A group of 32 slots and one head of one row: a query head, or the key and the value of a key head."""
    HALF: tl.constexpr = WIDTH // 2
    if OVERLAP:
        gdc_wait()
        if DECODE:
            gdc_launch_dependents()  # after the wait: see kv_attention.cu, which relies on it
    head = tl.program_id(1)
    row = tl.program_id(2)
    start = tl.load(lengths + row)
    group_start = (start // SLOTS + tl.program_id(0)) * SLOTS
    slots = group_start + tl.arange(0, SLOTS)
    inside = (slots >= start) & (slots < start + tokens)
    stored = inside & (slots < capacity)
    token = row.to(tl.int64) * tokens + (slots - start)
    source = qkv + token[:, None] * ((HEADS + 2 * KEY_HEADS) * WIDTH)
    d = tl.arange(0, HALF)[None, :]
    # Tokens beyond the capacity give NaN.
    cosine = tl.load(cosines + slots[:, None] * HALF + d, mask=stored[:, None], other=float("nan"))
    sine = tl.load(sines + slots[:, None] * HALF + d, mask=stored[:, None], other=float("nan"))
    if head < HEADS:
        low, high = _turned(source + head * WIDTH, inside, cosine, sine, query_norm, eps, WIDTH)
        target = q + (token[:, None] * HEADS + head) * WIDTH + d
        tl.store(target, low.to(q.dtype.element_ty), mask=inside[:, None])
        tl.store(target + HALF, high.to(q.dtype.element_ty), mask=inside[:, None])
    else:
        key_head = head - HEADS
        low, high = _turned(source + head * WIDTH, inside, cosine, sine, key_norm, eps, WIDTH)
        target = k + (token[:, None] * KEY_HEADS + key_head) * WIDTH + d
        tl.store(target, low.to(k.dtype.element_ty), mask=inside[:, None])
        tl.store(target + HALF, high.to(k.dtype.element_ty), mask=inside[:, None])
        pair = row.to(tl.int64) * KEY_HEADS + key_head
        value_source = qkv + (HEADS + KEY_HEADS + key_head) * WIDTH
        line = (HEADS + 2 * KEY_HEADS) * WIDTH
        wide = tl.arange(0, WIDTH)[None, :]
        if BITS == 16:
            place = (pair * capacity + slots[:, None]) * WIDTH
            tl.store(keys + place + d, low.to(keys.dtype.element_ty), mask=stored[:, None])
            tl.store(keys + place + HALF + d, high.to(keys.dtype.element_ty), mask=stored[:, None])
            value = tl.load(value_source + token[:, None] * line + wide, mask=stored[:, None], other=0.0)
            tl.store(values + place + wide, value, mask=stored[:, None])
        else:
            base = pair * capacity * (WIDTH * BITS // 8)
            steps = key_scale + key_head * WIDTH + d
            low_codes = _quantized(low, tl.load(steps), LIMIT)
            high_codes = _quantized(high, tl.load(steps + HALF), LIMIT)
            _store_keys(keys + base, low_codes, slots, stored, 0, WIDTH, BITS)
            _store_keys(keys + base, high_codes, slots, stored, HALF, WIDTH, BITS)
            value_step = tl.load(value_scale + key_head * WIDTH + wide)
            if BITS == 8:
                value = tl.load(value_source + token[:, None] * line + wide, mask=stored[:, None], other=0.0)
                codes = _quantized(value.to(tl.float32), value_step, LIMIT)
                byte, _ = value_place(slots[:, None], wide, WIDTH, BITS)
                tl.store(values + base + byte, codes.to(tl.uint8), mask=stored[:, None])
            else:
                # A byte holds slots s and s + 16 of one channel: bits of older tokens stay.
                first = group_start + tl.arange(0, SLOTS // 2)
                second = first + SLOTS // 2
                first_new = ((first >= start) & (first < start + tokens) & (first < capacity))[:, None]
                second_new = ((second >= start) & (second < start + tokens) & (second < capacity))[:, None]
                place = value_source + (row.to(tl.int64) * tokens + (first - start))[:, None] * line + wide
                first_value = tl.load(place, mask=first_new, other=0.0).to(tl.float32)
                second_value = tl.load(place + SLOTS // 2 * line, mask=second_new, other=0.0).to(tl.float32)
                byte, _ = value_place(first[:, None], wide, WIDTH, BITS)
                either = first_new | second_new
                old = tl.load(values + base + byte, mask=either & ~(first_new & second_new), other=0).to(tl.int32)
                low_bits = tl.where(first_new, _quantized(first_value, value_step, LIMIT), old) & 15
                high_bits = tl.where(second_new, _quantized(second_value, value_step, LIMIT) << 4, old) & 0xF0
                tl.store(values + base + byte, (low_bits | high_bits).to(tl.uint8), mask=either)


@triton.jit
def _read(
    keys,
    values,
    key_scale,
    value_scale,
    k,
    v,
    tokens,
    capacity,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Decode a group of slots of one (row, key head)."""
    pair = tl.program_id(1).to(tl.int64)
    wait_for_predecessor(OVERLAP)
    slot = (tl.program_id(0) * SLOTS + tl.arange(0, SLOTS))[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = slot < tokens
    base = pair * capacity * (WIDTH * BITS // 8)
    step = pair % KEY_HEADS * WIDTH + d
    target = (pair * tokens + slot) * WIDTH + d
    byte, shift = key_place(slot, d, WIDTH, BITS)
    key = codes_of(tl.load(keys + base + byte, mask=inside, other=0), shift, BITS).to(tl.float32) * tl.load(
        key_scale + step
    )
    tl.store(k + target, key.to(k.dtype.element_ty), mask=inside)
    byte, shift = value_place(slot, d, WIDTH, BITS)
    value = codes_of(tl.load(values + base + byte, mask=inside, other=0), shift, BITS).to(tl.float32)
    tl.store(v + target, (value * tl.load(value_scale + step)).to(v.dtype.element_ty), mask=inside)


def append(
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
    bits: int,
    q: Tensor,
    k: Tensor,
) -> None:
    """`kv_append` into given outputs; arguments as the op's, checked by it."""
    rows, tokens, heads, width = q.shape
    key_heads, capacity = key_cache.shape[1:3]
    grid = ((tokens + SLOTS - 2) // SLOTS + 1, heads + key_heads, rows)
    caches = (key_cache, value_cache, key_scale, value_scale)
    constants: dict[str, Any] = {
        "HEADS": heads,
        "KEY_HEADS": key_heads,
        "WIDTH": width,
        "BITS": bits,
        "LIMIT": float(code_limit(bits)) if bits < 16 else 0.0,
        "SLOTS": SLOTS,
        "DECODE": tokens == 1,
    }
    arguments = (qkv, cos, sin, lengths, *caches, query_norm, key_norm, q, k, eps, tokens, capacity)
    launch(_append, grid, arguments, qkv.device, warps=4, **constants)


def read(
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    tokens: int,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`kv_read` of a quantized cache; arguments as the op's, checked by it."""
    rows, key_heads, capacity, _ = key_cache.shape
    width = key_scale.shape[1]
    k, v = (key_cache.new_empty((rows, key_heads, tokens, width), dtype=dtype) for _ in range(2))
    launch(
        _read,
        (triton.cdiv(tokens, SLOTS), rows * key_heads),
        (key_cache, value_cache, key_scale, value_scale, k, v, tokens, capacity),
        key_cache.device,
        warps=4,
        KEY_HEADS=key_heads,
        WIDTH=width,
        BITS=bits,
        SLOTS=SLOTS,
    )
    return k, v
