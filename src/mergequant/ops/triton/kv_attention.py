"""Triton version of `kv_attention`.

For caches of floats (16 bits) this is the path that serves them: a program takes a part of the slots of one (row, key
head), all query heads that share it are the rows of one tile, and both products run on the tensor core, so that keys
and values are read once and nothing but memory limits it. Quantized caches are read code by code, in the order of
`kv_layout`: that is for GPUs that the CUDA kernel is not written for.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant.ops.triton.common import code_constants, launch, launch_strided, round_to_code, wait_for_predecessor
from mergequant.ops.triton.kv import codes_of, is_marked, key_place, value_place

__all__ = ["attend", "choose_splits"]

LEAST_ROWS = 16  # of a tile of the tensor core
BLOCK_FLOAT, BLOCK_CODES = 64, 32  # slots of a step
STAGES = 3  # blocks on their way from memory
MOST_SPLITS = 32
BLOCKS_PER_PROCESSOR = 2
PROCESSORS_UNKNOWN = 1  # interpreter

# Scores are base-2 logarithms. A hidden slot scores HIDDEN; maxima start at LOWEST, far above it, so that a hidden slot
# has no weight even where nothing else is visible.
HIDDEN = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-1e29)


@triton.jit
def _emit(out, result, place, mask, out_multiplier, multiplier_place, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Write float32 results as floats, or as codes where there is a multiplier."""
    if out_multiplier is not None:
        scaled = result * tl.load(out_multiplier + multiplier_place, mask=mask, other=0.0)
        tl.store(out + place, round_to_code(scaled, LOW, HIGH).to(tl.int8), mask=mask)
    else:
        tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q,
    keys,
    values,
    lengths,
    key_scale,
    value_scale,
    prefix_key,
    prefix_value,
    out_multiplier,
    partial_out,
    partial_sums,
    out,
    scale,
    capacity,
    table,
    table_stride,
    page_stride,
    PREFIX: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MULTIPLIER_STEP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One (row, key head) and one part of its slots. `scale` includes log2(e). With PAGE > 0 the cache lies in pages of
    so many slots, and the prefix counts where the row's first page is marked.

    The parts' results go to partial_out (pairs, splits, GROUP, WIDTH) and partial_sums (.., GROUP, 2: maximum, sum), or
    straight to `out` where there is only one.
    """
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    key_head = (pair % KEY_HEADS).to(tl.int32)
    wait_for_predecessor(OVERLAP)
    row = pair // KEY_HEADS
    length = tl.minimum(tl.load(lengths + row), capacity)
    head_start = pair * capacity * (WIDTH * (BITS if BITS != 16 else 8) // 8)  # in elements of the cache
    stored = PREFIX
    if PAGE > 0:
        head_start = key_head.to(tl.int64) * (PAGE * WIDTH * BITS // 8)
        numbers = table + row * table_stride
        if PREFIX > 0:
            number = tl.load(numbers, mask=length > 0, other=0).to(tl.int64)
            stored = tl.where(is_marked(tl.load(keys + head_start + number * page_stride), BITS), PREFIX, 0)
    # Parts are whole blocks of the row's own length, not of the longest row's.
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * part
    end = tl.minimum(begin + part, length)

    head = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    own = (head < GROUP)[:, None]
    x = tl.load(q + (pair * GROUP + head[:, None]) * WIDTH + d[None, :], mask=own, other=0.0)
    kind = x.dtype

    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    prefix_out = tl.zeros((ROWS, WIDTH), tl.float32)
    if PREFIX > 0:  # one step of its own, by the first part
        prefix_slot = tl.arange(0, 16)
        prefix_visible = prefix_slot < tl.where(split == 0, tl.minimum(length, stored), 0)
        prefix_place = (key_head * PREFIX + prefix_slot[:, None]) * WIDTH + d[None, :]
        prefix_k = tl.load(prefix_key + prefix_place, mask=prefix_visible[:, None], other=0.0)
        prefix_v = tl.load(prefix_value + prefix_place, mask=prefix_visible[:, None], other=0.0)
        prefix_score = tl.dot(x, tl.trans(prefix_k), input_precision="ieee") * scale
        prefix_score = tl.where(prefix_visible[None, :], prefix_score, HIDDEN)
        top = tl.maximum(top, tl.max(prefix_score, 1))
        prefix_p = tl.exp2(prefix_score - top[:, None])
        total = tl.sum(prefix_p, 1)
        prefix_out = tl.dot(prefix_p.to(kind), prefix_v, input_precision="ieee")
    prefix_top = top

    if BITS != 16:
        # The steps of the keys go into q, which then no longer fits its dtype: two summands keep 16 bits of it.
        folded = x.to(tl.float32) * tl.load(key_scale + key_head * WIDTH + d)[None, :]
        x = folded.to(kind)
        rest = (folded - x.to(tl.float32)).to(kind)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        visible = slot < end
        start = head_start
        own_slot = slot
        if PAGE > 0:
            start += tl.load(numbers + first // PAGE).to(tl.int64) * page_stride
            own_slot = slot % PAGE
        if BITS == 16:
            place = head_start + slot[:, None] * WIDTH + d[None, :]
            kt = tl.trans(tl.load(keys + place, mask=visible[:, None], other=0.0))
            score = tl.dot(x, kt, input_precision="ieee") * scale
            v = tl.load(values + place, mask=visible[:, None], other=0.0)
        else:
            byte, shift = key_place(own_slot[:, None], d[None, :], WIDTH, BITS)
            kb = tl.load(keys + start + byte, mask=visible[:, None], other=0)
            kt = tl.trans(codes_of(kb, shift, BITS).to(kind))
            score = (tl.dot(x, kt, input_precision="ieee") + tl.dot(rest, kt, input_precision="ieee")) * scale
            byte, shift = value_place(own_slot[:, None], d[None, :], WIDTH, BITS)
            vb = tl.load(values + start + byte, mask=visible[:, None], other=0)
            v = codes_of(vb, shift, BITS).to(kind)
        score = tl.where((visible & (slot >= stored))[None, :], score, HIDDEN)
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(top - new_top)
        p = tl.exp2(score - new_top[:, None])
        total = total * weight + tl.sum(p, 1)
        acc = acc * weight[:, None] + tl.dot(p.to(kind), v, input_precision="ieee")
        top = new_top
    if BITS != 16:
        acc = acc * tl.load(value_scale + key_head * WIDTH + d)[None, :]
    if PREFIX > 0:
        acc += prefix_out * tl.exp2(prefix_top - top)[:, None]

    if SPLITS == 1:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row without visible slots gives zeros
        place = (pair * GROUP + head[:, None]) * WIDTH + d[None, :]
        multiplier_place = ((key_head * GROUP + head[:, None]) * WIDTH + d[None, :]) * MULTIPLIER_STEP
        _emit(out, result, place, own, out_multiplier, multiplier_place, LOW, HIGH)
    else:
        line = (pair * SPLITS + split) * GROUP + head
        tl.store(partial_out + line[:, None] * WIDTH + d[None, :], acc, mask=own)
        tl.store(partial_sums + line * 2, top, mask=head < GROUP)
        tl.store(partial_sums + line * 2 + 1, total, mask=head < GROUP)


@triton.jit
def _combine(
    partial_out,
    partial_sums,
    out_multiplier,
    out,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    MULTIPLIER_STEP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of one row: the softmax over all parts from the parts' maxima, sums and outputs."""
    index = tl.program_id(0).to(tl.int64)  # row * heads + head
    wait_for_predecessor(OVERLAP)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    line = (index // GROUP * SPLITS + split) * GROUP + index % GROUP
    top = tl.load(partial_sums + line * 2)
    total = tl.load(partial_sums + line * 2 + 1)
    parts = tl.load(partial_out + line[:, None] * WIDTH + d[None, :])
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * weight, 0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    multiplier_place = ((index % HEADS) * WIDTH + d) * MULTIPLIER_STEP
    _emit(out, result, index * WIDTH + d, d < WIDTH, out_multiplier, multiplier_place, LOW, HIGH)


def attend(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    softmax_scale: float,
    bits: int,
    most: int,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out_multiplier: Tensor | None,
    out_bits: int,
    out: Tensor,
    splits: int | None = None,
    table: Tensor | None = None,
) -> None:
    """`kv_attention` into a given output; arguments as the op's, checked by it. `splits` is for tuning.

    With `table` the caches are the keys and the values of `kv_page_attention`'s pages, (pages, key_heads, page, bytes).
    """
    rows, heads, width = q.shape
    key_heads, slots = key_cache.shape[1:3]
    capacity = slots if table is None else slots * table.shape[1]
    pages = (None, 0, 0) if table is None else (table, table.stride(0), key_cache.stride(0))
    group, pairs = heads // key_heads, rows * key_heads
    block = BLOCK_FLOAT if bits == 16 else BLOCK_CODES
    if splits is None:
        splits = choose_splits(pairs, min(most, capacity), block, q.device)
    partial_out = partial_sums = out
    if splits > 1:
        partial_out = q.new_empty((pairs, splits, group, width), dtype=torch.float32)
        partial_sums = q.new_empty((pairs, splits, group, 2), dtype=torch.float32)
    emitting: dict[str, Any] = {
        "MULTIPLIER_STEP": 0 if out_multiplier is not None and out_multiplier.numel() == 1 else 1
    }
    emitting |= {name: value for name, value in code_constants(out_bits or 8).items() if name in ("LOW", "HIGH")}
    caches = (key_cache, value_cache, lengths, key_scale, value_scale, prefix_key, prefix_value)
    run = launch if table is None else launch_strided
    run(
        _attend,
        (pairs, splits),
        (
            *(q, *caches, out_multiplier, partial_out, partial_sums, out),
            *(softmax_scale * math.log2(math.e), capacity, *pages),
        ),
        q.device,
        warps=4,
        stages=STAGES,
        PREFIX=0 if prefix_key is None else prefix_key.shape[1],
        KEY_HEADS=key_heads,
        GROUP=group,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)),
        WIDTH=width,
        BITS=bits,
        PAGE=0 if table is None else slots,
        BLOCK=block,
        SPLITS=splits,
        **emitting,
    )
    if splits > 1:
        launch(
            _combine,
            (rows * heads,),
            (partial_out, partial_sums, out_multiplier, out),
            q.device,
            warps=2,
            GROUP=group,
            HEADS=heads,
            WIDTH=width,
            SPLITS=splits,
            **emitting,
        )


def choose_splits(pairs: int, most: int, block: int, device: torch.device) -> int:
    """Parts per (row, key head): a power of two, so that all multiprocessors have work and no part is empty."""
    processors = PROCESSORS_UNKNOWN
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = 1
    while splits < MOST_SPLITS and pairs * splits < BLOCKS_PER_PROCESSOR * processors and splits * block < most:
        splits *= 2
    return splits
