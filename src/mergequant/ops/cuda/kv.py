"""Host side of the cache kernels: which variant runs, divided how, and its launch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import Long, kernel, multiprocessors
from mergequant.ops.overlap import overlaps

__all__ = ["Division", "append", "append_unit", "attend", "attention_unit", "choose", "configurations"]

APPEND, ATTENTION = "kv_append", "kv_attention"  # kernels, and stems of their sources
ONE_APPEND_THREADS = 128  # for one token in a row; for more, lanes of APPEND_CHANNELS own a token of APPEND_SLOTS
APPEND_SLOTS, APPEND_CHANNELS = 32, 8
CHUNK_BYTES = 4096  # of keys, and of values, that a warp takes at once
MOST_CHUNK = 64  # slots
WARP_CHOICES = (2, 4, 8)
SPLIT_CHOICES = (1, 2, 4, 8)  # blocks of a cluster; 8 is the portable limit
# Warps that shall fit on a multiprocessor: 12 leave a thread 168 registers, 8 leave it 255. More warps hide more
# latency, as long as nothing spills.
MANY_WARPS, FEW_WARPS = 12, 8
MANY_CHUNKS = 16  # of a pair: enough for four warps
MOST_FILL = 0.75  # of the multiprocessors that clusters may ask for; they have to find places side by side


@dataclass(frozen=True)
class Division:
    """How the attention of one (row, key head) is divided.

    Attributes:
        warps: of a block; they take chunks of slots in turn.
        splits: blocks, a cluster.
        resident: warps that shall fit on a multiprocessor (limits the registers).
    """

    warps: int
    splits: int
    resident: int


def append_unit(width: int, group: int, bits: int, dtype: torch.dtype, one: bool) -> Unit:
    """The append kernel for heads of `width` channels, `group` query heads per key head; `one`: one token in a row."""
    return Unit(
        f"{APPEND}.cu",
        (
            ("MQ_HEAD", width),
            ("MQ_BITS", bits),
            ("MQ_GROUP", group),
            ("MQ_FLOAT16", int(dtype == torch.float16)),
            ("MQ_ONE", int(one)),
        ),
    )


def append_threads(width: int, one: bool) -> int:
    """Threads of a block of the append kernel; the same formula as in the kernel."""
    return ONE_APPEND_THREADS if one else APPEND_SLOTS * width // 2 // APPEND_CHANNELS


def attention_unit(
    width: int, group: int, bits: int, dtype: torch.dtype, prefix: bool, warps: int, resident: int, paged: bool = False
) -> Unit:
    """The attention kernel; `prefix`: some slots are attended in float; `paged`: on a cache in pages."""
    return Unit(
        f"{ATTENTION}.cu",
        (
            ("MQ_HEAD", width),
            ("MQ_BITS", bits),
            ("MQ_GROUP", group),
            ("MQ_WARPS", warps),
            ("MQ_BLOCKS", max(1, resident // warps)),
            ("MQ_FLOAT16", int(dtype == torch.float16)),
            ("MQ_PREFIX", int(prefix)),
            ("MQ_PAGED", int(paged)),
        ),
    )


def chunk_slots(width: int, bits: int) -> int:
    """Slots of a chunk; the same formula as in the kernel."""
    return min(MOST_CHUNK, CHUNK_BYTES * 8 // (width * bits))


def resident_warps(width: int, group: int, bits: int, prefix: bool) -> int:
    """Warps per multiprocessor that the registers of a variant allow without spills (a test keeps this true)."""
    return FEW_WARPS if width * bits > 512 or (prefix and group > 4) else MANY_WARPS


def choose(pairs: int, most: int, width: int, bits: int, processors: int) -> Division:
    """Division for `pairs` = batch * key heads of at most `most` slots.

    Measured on an NVIDIA H200 (`benchmarks/tune_kv.py`; within 2 % of the best division on average): where every pair
    can have a multiprocessor, one block of many warps for each, split over a cluster while the clusters find their
    places side by side; else one small block for each pair, several of them on a multiprocessor. A warp without a chunk
    is wasted.
    """
    chunks = -(-most // chunk_slots(width, bits))
    if pairs > processors:
        return Division(4 if chunks >= MANY_CHUNKS else 2, 1, FEW_WARPS)
    warps = next((known for known in reversed(WARP_CHOICES) if known <= chunks), WARP_CHOICES[0])
    splits = 1
    while splits < SPLIT_CHOICES[-1] and 2 * splits * pairs <= MOST_FILL * processors and 2 * splits * warps <= chunks:
        splits *= 2
    return Division(warps, splits, FEW_WARPS)


def configurations(width: int, group: int, bits: int, prefix: bool) -> Iterator[Division]:
    """All divisions that a tuner may try."""
    for warps in WARP_CHOICES:
        for resident in sorted({FEW_WARPS, resident_warps(width, group, bits, prefix)}):
            if resident == MANY_WARPS and warps == WARP_CHOICES[-1]:
                continue  # 12 is no multiple of 8
            for splits in SPLIT_CHOICES:
                yield Division(warps, splits, resident)


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
    unit = append_unit(width, heads // key_heads, bits, qkv.dtype, tokens == 1)
    # Tokens start anywhere in a group of slots, so they may touch one group more than they fill.
    groups = (tokens + APPEND_SLOTS - 2) // APPEND_SLOTS + 1
    kernel(unit, APPEND, qkv.device).launch(
        (key_heads, groups, rows),
        append_threads(width, tokens == 1),
        (
            qkv,
            cos,
            sin,
            lengths,
            key_cache,
            value_cache,
            _contiguous(key_scale),
            _contiguous(value_scale),
            _contiguous(query_norm),
            _contiguous(key_norm),
            q,
            k,
            float(eps),
            tokens,
            capacity,
        ),
        overlap=overlaps(qkv.device),
    )


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
    early: bool,
    out: Tensor,
    division: Division | None = None,
    table: Tensor | None = None,
) -> None:
    """`kv_attention` into a given output; arguments as the op's, checked by it. `division` is for tuning.

    With `table` the caches are the keys and the values of `kv_page_attention`'s pages, (pages, key_heads, page, bytes).
    """
    rows, heads, width = q.shape
    key_heads, slots = key_cache.shape[1:3]
    capacity = slots if table is None else slots * table.shape[1]
    group = heads // key_heads
    prefix = 0 if prefix_key is None else prefix_key.shape[1]
    expected = min(most, capacity)
    if division is None:
        processors = multiprocessors(q.device)
        division = choose(rows * key_heads, expected, width, bits, processors)
    unit = attention_unit(width, group, bits, q.dtype, prefix > 0, division.warps, division.resident, table is not None)
    overlap = overlaps(q.device) and table is None
    kernel(unit, ATTENTION, q.device).launch(
        (key_heads, division.splits, rows),
        division.warps * 32,
        (
            q,
            key_cache,
            value_cache,
            lengths,
            _contiguous(key_scale),
            _contiguous(value_scale),
            prefix_key,
            prefix_value,
            _contiguous(out_multiplier),
            out,
            softmax_scale * math.log2(math.e),
            capacity,
            expected,
            prefix,
            0 if out_multiplier is not None and out_multiplier.shape[0] == 1 else 1,
            out_bits,
            int(early and overlap),
            q.stride(0),
            table,
            0 if table is None else table.stride(0),
            slots,
            Long(key_cache.stride(0)),
        ),
        cluster=(1, division.splits, 1),
        overlap=overlap,
    )


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
