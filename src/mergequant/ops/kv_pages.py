"""Quantized caches in pages: `kv_store`, `kv_page_attention`, `kv_page_read`. For engines that keep a table of blocks.

    pages   uint8 (pages, 2, key_heads, page, D * bits / 8): the keys, then the values, of `page` tokens of a layer
    table   int32 (rows, most pages of a row): token s of a row lies in page table[row, s // page], at s % page
    slot    page number * page + place in it; the same for all layers

`page` is a multiple of 64, so each head of a page is a cache of `kv_layout`, and pages side by side are a longer one.

A stored first token (`prefix_key`, `prefix_value`: floats that codes cannot hold) belongs to the rows whose text begins
with it. Where a token with this very key, in all heads, is stored in the first slot of a page, the page is marked, by a
code of the key's channel 0 that no other key has. Attention reads the mark of a row's first page. So it goes where the
page goes: to another request that shares it, to a copy, to another machine.
"""

import torch
from torch import Tensor

from mergequant.ops._kv import pick, require_lengths, unserved
from mergequant.ops._register import register_mutating_op
from mergequant.ops._validate import require, require_float
from mergequant.ops.kv_attention import reference
from mergequant.ops.kv_layout import (
    CAPACITY_MULTIPLE,
    cache_width,
    is_marked,
    mark_code,
    put_codes,
    quantize,
    unpack_keys,
    unpack_values,
)

__all__ = ["kv_page_attention", "kv_page_read", "kv_store"]

ALIGNED = 16  # bytes: what a thread of the store kernel loads at once


@register_mutating_op("value", "pages")
def kv_store(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pages: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> None:
    """Quantize keys and values of new tokens into the pages, in place.

    Args:
        key: float (tokens, key_heads, D), rotated; heads of a token follow one another in memory.
        value: likewise. A token that is the stored one gets the stored value, in place.
        slots: int64 (tokens,), no two equal; below 0: the token is not stored.
        pages: as above.
        key_scale, value_scale: float32 (key_heads, D), positive.
        bits: 4 or 8.
        prefix_key, prefix_value: optional (key_heads, 1, D) in key's dtype: the stored token.

    Raises:
        KernelError: a dtype, shape or device that is not as above; on a CPU also slots that the pages do not have.
    """
    op = "kv_store"
    require_float(op, "key", key)
    require(key.dim() == 3, lambda: f"{op}: key {tuple(key.shape)} is not (tokens, heads, width)")
    tokens, key_heads, width = key.shape
    require(
        value.shape == key.shape and value.dtype == key.dtype and value.device == key.device,
        lambda: f"{op}: value is {value.dtype} {tuple(value.shape)}; pass it like key, {key.dtype} {tuple(key.shape)}",
    )
    _require_pages(op, pages, key_scale, value_scale, bits, width, key_heads, key)
    _require_prefix(op, prefix_key, prefix_value, key_heads, width, key)
    require(
        slots.shape == (tokens,) and slots.dtype == torch.int64 and slots.device == key.device,
        lambda: f"{op}: slots is {slots.dtype} {tuple(slots.shape)}; pass int64 ({tokens},) on {key.device}",
    )
    if not tokens:
        return
    if key.device.type == "cpu":
        most = pages.shape[0] * pages.shape[3]
        require(int(slots.max()) < most, lambda: f"{op}: slot {int(slots.max())} lies behind the {most} of the pages")
    if pick(op, key.device, {"cuda": unserved(width, 1, key.dtype, bits)["cuda"]}) == "cuda":
        from mergequant.ops.cuda.kv_pages import store

        require(_aligned(value), lambda: f"{op}: value has strides {value.stride()}; pass heads side by side")
        store(
            key if _aligned(key) else key.contiguous(),
            value,
            slots,
            pages,
            key_scale.contiguous(),
            value_scale.contiguous(),
            bits,
            prefix_key,
            prefix_value,
        )
        return
    _store(key, value, slots, pages, key_scale, value_scale, bits, prefix_key, prefix_value)


@kv_store.register_fake
def _(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pages: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> None:
    return None


@register_mutating_op("out")
def kv_page_attention(
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    softmax_scale: float,
    bits: int,
    most: int,
    out: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> None:
    """Attention of one query token per row over the tokens that its pages hold: `kv_attention` of the row's pages.

    Args:
        q: float (rows, heads, D), rotated; heads of a row follow one another in memory.
        pages, table: as above; entries of the table behind a row's last page are not used.
        lengths: int32 (rows,): visible tokens of each row. A row of 0 gives zeros.
        key_scale, value_scale: float32 (key_heads, D).
        softmax_scale: factor of q . k.
        bits: 4 or 8.
        most: the host's upper bound of `lengths`; how the work is divided depends on it, the result does not.
        out: (rows, heads, D) in q's dtype, contiguous: the result.
        prefix_key, prefix_value: optional (key_heads, 1, D) in q's dtype: the stored token.

    Raises:
        KernelError: a dtype, shape or device that is not as above; on a CPU also lengths beyond the table.
    """
    op = "kv_page_attention"
    require_float(op, "q", q)
    require(q.dim() == 3, lambda: f"{op}: q {tuple(q.shape)} is not (rows, heads, width)")
    rows, heads, width = q.shape
    page = _require_pages(op, pages, key_scale, value_scale, bits, width, pages.shape[2], q)
    key_heads = pages.shape[2]
    require(heads % key_heads == 0, lambda: f"{op}: {heads} query heads are no multiple of {key_heads} key heads")
    require(most > 0, lambda: f"{op}: most is {most}; pass the largest length that can occur")
    _require_table(op, table, rows, q)
    require_lengths(op, lengths, rows, q.device, table.shape[1] * page)
    require(
        out.shape == q.shape and out.dtype == q.dtype and out.device == q.device and out.is_contiguous(),
        lambda: f"{op}: out is {out.dtype} {tuple(out.shape)}; pass contiguous {q.dtype} {tuple(q.shape)}",
    )
    _require_prefix(op, prefix_key, prefix_value, key_heads, width, q)
    if not rows:
        return
    backend = pick(op, q.device, unserved(width, heads // key_heads, q.dtype, bits))
    if backend == "torch":
        begins, keys, values = _rows_of(pages, table, bits)
        own = (lengths, key_scale, value_scale, softmax_scale, bits, prefix_key, prefix_value, begins)
        out.copy_(reference(q, keys, values, *own).to(q.dtype).view_as(out))
        return
    scales = (key_scale.contiguous(), value_scale.contiguous())
    given = (lengths, *scales, softmax_scale, bits, most, prefix_key, prefix_value, None, 0)
    if backend == "cuda":
        from mergequant.ops.cuda.kv import attend

        attend(q if _aligned(q) else q.contiguous(), pages[:, 0], pages[:, 1], *given, False, out, table=table)
    else:
        from mergequant.ops.triton import kv_attention as in_triton

        in_triton.attend(q.contiguous(), pages[:, 0], pages[:, 1], *given, out, table=table)


@kv_page_attention.register_fake
def _(
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    softmax_scale: float,
    bits: int,
    most: int,
    out: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> None:
    return None


@register_mutating_op("out_key", "out_value")
def kv_page_read(
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
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> None:
    """Keys and values of whole rows as floats, one behind the other: what pages hold, then what is fresh.

    For attention of many queries, by kernels that take floats. Fresh tokens come as they are, not as their codes.

    Args:
        pages, table: as above.
        starts: int32 (rows + 1,): where each row begins in the result, and where the last one ends.
        key, value: float (fresh tokens, key_heads, D); heads of a token follow one another in memory.
        fresh_starts: int32 (rows + 1,): likewise the fresh tokens of each row in these; all others come from the pages.
        key_scale, value_scale: float32 (key_heads, D).
        bits: 4 or 8.
        most: upper bound of a row's tokens.
        out_key, out_value: (at least starts[-1], key_heads, D) like key, contiguous; code * scale is rounded to its
            dtype once.
        prefix_key, prefix_value: optional (key_heads, 1, D): the stored token, of rows whose first page is marked.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    op = "kv_page_read"
    require_float(op, "key", key)
    require(key.dim() == 3 and value.shape == key.shape, lambda: f"{op}: key and value are not (tokens, heads, width)")
    key_heads, width = key.shape[1:]
    _require_pages(op, pages, key_scale, value_scale, bits, width, key_heads, key)
    rows = starts.shape[0] - 1
    _require_table(op, table, rows, key)
    for name, places in (("starts", starts), ("fresh_starts", fresh_starts)):
        require_lengths(f"{op}, {name}", places, rows + 1, key.device, 2**31 - 1)
    for name, out in (("out_key", out_key), ("out_value", out_value)):
        require(
            out.dim() == 3 and out.shape[1:] == key.shape[1:] and out.dtype == key.dtype and out.is_contiguous(),
            lambda: f"{op}: {name} is {out.dtype} {tuple(out.shape)}; pass {key.dtype} (tokens, {key_heads}, {width})",
        )
    require(most > 0, lambda: f"{op}: most is {most}; pass the most tokens of a row")
    _require_prefix(op, prefix_key, prefix_value, key_heads, width, key)
    if not rows:
        return
    given = (key_scale, value_scale, bits)
    if pick(op, key.device, {"triton": unserved(width, 1, key.dtype, bits)["triton"]}) == "triton":
        from mergequant.ops.triton.kv_pages import read

        key, value = (x if _side_by_side(x) else x.contiguous() for x in (key, value))
        read(pages, table, starts, key, value, fresh_starts, *given, most, out_key, out_value, prefix_key, prefix_value)
        return
    _read(pages, table, starts, key, value, fresh_starts, *given, out_key, out_value, prefix_key, prefix_value)


@kv_page_read.register_fake
def _(
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
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> None:
    return None


def _store(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pages: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    """Reference of `kv_store`. It looks at the slots, so it waits for a GPU."""
    page = pages.shape[3]
    new = [quantize(x.float(), scale, bits) for x, scale in ((key, key_scale), (value, value_scale))]
    if prefix_key is not None and prefix_value is not None:
        same = key.contiguous().view(torch.uint8) == prefix_key.transpose(0, 1).contiguous().view(torch.uint8)
        stored = same.flatten(1).all(1) & (slots >= 0) & (slots % page == 0)
        new[0][stored, :, 0] = mark_code(bits)
        value[stored] = prefix_value[:, 0]
    kept = torch.nonzero(slots >= 0)[:, 0]
    own = slots[kept]
    for part, codes in enumerate(new):
        for number in torch.unique(own // page).tolist():
            chosen = own // page == number
            places, x = own[chosen] % page, codes[kept[chosen]].transpose(0, 1)[None]
            put_codes(pages[number : number + 1, part], x, places[None], bits, part == 0)


def _read(
    pages: Tensor,
    table: Tensor,
    starts: Tensor,
    key: Tensor,
    value: Tensor,
    fresh_starts: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    out_key: Tensor,
    out_value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    """Reference of `kv_page_read`. It looks at the rows' starts, so it waits for a GPU."""
    begins, keys, values = _rows_of(pages, table, bits)
    halves = (
        (unpack_keys, keys, key_scale, key, prefix_key, out_key),
        (unpack_values, values, value_scale, value, prefix_value, out_value),
    )
    bounds, fresh_bounds = starts.tolist(), fresh_starts.tolist()
    for row in range(len(bounds) - 1):
        fresh = slice(fresh_bounds[row], fresh_bounds[row + 1])
        past = bounds[row + 1] - bounds[row] - (fresh.stop - fresh.start)
        for unpack, cache, scale, new, prefix, out in halves:
            old = (unpack(cache[row], key.shape[2], bits)[:, :past].float() * scale[:, None]).to(out.dtype)
            if prefix is not None and past:
                old[:, 0] = torch.where(begins[row, :, None], prefix[:, 0], old[:, 0])
            out[bounds[row] : bounds[row + 1]] = torch.cat((old.transpose(0, 1), new[fresh]))


def _rows_of(pages: Tensor, table: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as contiguous caches: bool (rows, key_heads), whether the first page is marked; keys and values
    (rows, key_heads, most tokens, bytes)."""
    own = pages[table.long().clamp(0, pages.shape[0] - 1)]  # (rows, numbers, 2, heads, page, bytes)
    rows, numbers, _, heads, page, stored = own.shape
    keys, values = own.permute(2, 0, 3, 1, 4, 5).reshape(2, rows, heads, numbers * page, stored)
    return is_marked(keys, bits), keys, values


def _side_by_side(x: Tensor) -> bool:
    """Whether the heads of a token follow one another in memory."""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def _aligned(x: Tensor) -> bool:
    """Likewise, and each begins where a thread may load 16 bytes."""
    size = x.element_size()
    return _side_by_side(x) and x.stride(0) * size % ALIGNED == 0 and x.data_ptr() % ALIGNED == 0


def _require_pages(
    op: str,
    pages: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    width: int,
    key_heads: int,
    like: Tensor,
) -> int:
    """Check pages and scales; return the tokens of a page."""
    wanted = cache_width(width, bits)
    require(
        pages.dim() == 5 and pages.shape[1] == 2 and pages.shape[2] == key_heads and pages.shape[4] == wanted,
        lambda: f"{op}: pages are {tuple(pages.shape)}; pass (pages, 2, {key_heads}, page, {wanted})",
    )
    require(
        pages.dtype == torch.uint8 and pages.is_contiguous() and pages.device == like.device,
        lambda: f"{op}: pages are {pages.dtype} on {pages.device}; pass contiguous uint8 on {like.device}",
    )
    page = pages.shape[3]
    require(
        page > 0 and page % CAPACITY_MULTIPLE == 0,
        lambda: f"{op}: pages of {page} tokens; pass a multiple of {CAPACITY_MULTIPLE}",
    )
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        require(
            scale.shape == (key_heads, width) and scale.dtype == torch.float32 and scale.device == like.device,
            lambda: f"{op}: {name} is {scale.dtype} {tuple(scale.shape)}; pass float32 ({key_heads}, {width})",
        )
    return page


def _require_table(op: str, table: Tensor, rows: int, like: Tensor) -> None:
    require(
        table.dim() == 2 and table.shape[0] == rows and table.dtype == torch.int32 and table.device == like.device,
        lambda: f"{op}: table is {table.dtype} {tuple(table.shape)}; pass int32 ({rows}, pages) on {like.device}",
    )
    require(table.stride(1) == 1, lambda: f"{op}: table has strides {table.stride()}; pass rows side by side")


def _require_prefix(
    op: str, prefix_key: Tensor | None, prefix_value: Tensor | None, key_heads: int, width: int, like: Tensor
) -> None:
    require((prefix_key is None) == (prefix_value is None), lambda: f"{op}: prefix_key and prefix_value go together")
    for name, prefix in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        require(
            prefix is None
            or (
                prefix.shape == (key_heads, 1, width)
                and prefix.dtype == like.dtype
                and prefix.device == like.device
                and prefix.is_contiguous()
            ),
            lambda: f"{op}: {name} must be contiguous {like.dtype} ({key_heads}, 1, {width}) on {like.device}",
        )
