"""Triton version of `kv_page_read`: rows of pages and of fresh tokens as floats, one behind the other."""

import triton
import triton.language as tl
from torch import Tensor

from mergequant.ops.triton.common import launch_strided, wait_for_predecessor
from mergequant.ops.triton.kv import codes_of, is_marked, key_place, value_place

__all__ = ["read"]

SLOTS = 32  # of a program; pages are multiples of it


@triton.jit
def _read(
    pages,
    table,
    starts,
    key,
    value,
    fresh_starts,
    key_scale,
    value_scale,
    prefix_key,
    prefix_value,
    k,
    v,
    table_stride,
    key_stride,
    value_stride,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A group of tokens of one row and one head."""
    HALF_PAGE: tl.constexpr = KEY_HEADS * PAGE * WIDTH * BITS // 8
    wait_for_predecessor(OVERLAP)
    first = tl.program_id(0) * SLOTS
    row = tl.program_id(1)
    head = tl.program_id(2)
    start = tl.load(starts + row)
    fresh = tl.load(fresh_starts + row)
    count = tl.load(starts + row + 1) - start
    past = count - (tl.load(fresh_starts + row + 1) - fresh)
    if first < count:
        slot = first + tl.arange(0, SLOTS)[:, None]
        d = tl.arange(0, WIDTH)[None, :]
        old = slot < past
        number = tl.load(table + row.to(tl.int64) * table_stride + first // PAGE, mask=first < past, other=0)
        base = pages + (number.to(tl.int64) * 2 * KEY_HEADS + head) * (HALF_PAGE // KEY_HEADS)
        byte, shift = key_place(slot % PAGE, d, WIDTH, BITS)
        old_key = codes_of(tl.load(base + byte, mask=old, other=0), shift, BITS).to(tl.float32)
        old_key = (old_key * tl.load(key_scale + head * WIDTH + d)).to(k.dtype.element_ty)
        byte, shift = value_place(slot % PAGE, d, WIDTH, BITS)
        old_value = codes_of(tl.load(base + HALF_PAGE + byte, mask=old, other=0), shift, BITS).to(tl.float32)
        old_value = (old_value * tl.load(value_scale + head * WIDTH + d)).to(v.dtype.element_ty)
        if prefix_key is not None:
            stored = (slot == 0) & is_marked(tl.load(base, mask=(first == 0) & (past > 0), other=0), BITS)
            old_key = tl.where(stored, tl.load(prefix_key + head * WIDTH + d), old_key)
            old_value = tl.where(stored, tl.load(prefix_value + head * WIDTH + d), old_value)
        new = (slot >= past) & (slot < count)
        token = (fresh + slot - past).to(tl.int64)
        new_key = tl.load(key + token * key_stride + head * WIDTH + d, mask=new, other=0.0)
        new_value = tl.load(value + token * value_stride + head * WIDTH + d, mask=new, other=0.0)
        target = ((start + slot).to(tl.int64) * KEY_HEADS + head) * WIDTH + d
        tl.store(k + target, tl.where(old, old_key, new_key), mask=slot < count)
        tl.store(v + target, tl.where(old, old_value, new_value), mask=slot < count)


def read(
    pages: Tensor,
    table: Tensor,
    starts: Tensor,
    key: Tensor,
    value: Tensor,
    fresh_starts: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    most: int,
    out_key: Tensor,
    out_value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    """`kv_page_read`; arguments as the op's, checked by it."""
    rows, (key_heads, width) = table.shape[0], key.shape[1:]
    scales = (key_scale.contiguous(), value_scale.contiguous())
    launch_strided(
        _read,
        (triton.cdiv(most, SLOTS), rows, key_heads),
        (
            *(pages, table, starts, key, value, fresh_starts, *scales, prefix_key, prefix_value, out_key, out_value),
            *(table.stride(0), key.stride(0), value.stride(0)),
        ),
        key.device,
        warps=4,
        KEY_HEADS=key_heads,
        WIDTH=width,
        BITS=bits,
        PAGE=pages.shape[3],
        SLOTS=SLOTS,
    )
