"""Triton kernels of the float baselines: what stands between two GEMMs, fused as a good bf16 or fp8 engine does it.

The same functions as in `plain.py`, which says what they compute. They share no code with mergequant's own ops, so that
a change there leaves the baselines alone. All are launched with programmatic overlap (a kernel may start while the one
before it drains; nothing is read that others write before `gdc_wait`), for the integer path has that too.

Only importable where Triton is. Under TRITON_INTERPRET=1 they run on CPU tensors, for tests.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["NAMES", "add_norm", "decode_attention", "quantize_rows", "rope_append", "silu_mul"]

NAMES = {"norm": "triton add_norm", "rope": "triton rope_append", "silu": "triton silu_mul", "rows": "triton fp8_rows"}
FP8_MOST = tl.constexpr(448.0)  # largest float8_e4m3fn
NEVER = tl.constexpr(-1e30)  # a score that has no weight
LOG2_E = 1.4426950408889634
QUERY_ROWS = 16  # least rows of a tensor core product; query heads of one key head fill a part of them
SLOTS = 64  # cache slots that one step of the attention loop reads
MOST_SPLITS = 32


@triton.jit
def _add_norm(
    update, residual, weight, out, scale, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, FP8: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(residual + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(update + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + row * WIDTH + column, x.to(residual.dtype.element_ty), mask=inside)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * gain
    if FP8:
        step = tl.max(tl.abs(y), 0) / FP8_MOST + 1e-12
        tl.store(scale + row, step)
        y = y / step
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_rows(x, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    step = tl.max(tl.abs(y), 0) / FP8_MOST + 1e-12
    tl.store(out + row * WIDTH + column, (y / step).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, step)


@triton.jit
def _silu_mul(gate_up, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if FP8:  # then one block is a whole row
        step = tl.max(tl.abs(y), 0) / FP8_MOST + 1e-12
        tl.store(scale + row, step)
        y = y / step
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope_append(
    qkv, queries, keys, values, cos, sin, lengths, query_norm, key_norm, eps, steps, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = WIDTH // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # queries, then keys, then values, as in qkv
    pair = tl.arange(0, HALF)
    sequence = token // steps
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(lengths + sequence) + token % steps
    cosine = tl.load(cos + position * HALF + pair)[None, :]
    sine = tl.load(sin + position * HALF + pair)[None, :]
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < ALL)
    place = (token * ALL + head[:, None]) * WIDTH + pair[None, :]
    low = tl.load(qkv + place, mask=(head < ALL)[:, None], other=0.0).to(tl.float32)
    high = tl.load(qkv + place + HALF, mask=(head < ALL)[:, None], other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / WIDTH + eps)[:, None]
        low_gain = tl.where(is_query[:, None], tl.load(query_norm + pair)[None, :], tl.load(key_norm + pair)[None, :])
        high_query = tl.load(query_norm + HALF + pair)[None, :]
        high_gain = tl.where(is_query[:, None], high_query, tl.load(key_norm + HALF + pair)[None, :])
        low = tl.where(is_value[:, None], low, low * inverse * low_gain)
        high = tl.where(is_value[:, None], high, high * inverse * high_gain)
    new_low = low * cosine - high * sine
    new_high = high * cosine + low * sine
    place = (token * HEADS + head[:, None]) * WIDTH + pair[None, :]
    kind = queries.dtype.element_ty
    tl.store(queries + place, new_low.to(kind), mask=is_query[:, None])
    tl.store(queries + place + HALF, new_high.to(kind), mask=is_query[:, None])
    own = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)  # negative for queries, which are masked out
    place = ((sequence * KV_HEADS + own[:, None]) * capacity + position) * WIDTH + pair[None, :]
    tl.store(keys + place, new_low.to(kind), mask=is_key[:, None])
    tl.store(keys + place + HALF, new_high.to(kind), mask=is_key[:, None])
    tl.store(values + place, low.to(kind), mask=is_value[:, None])
    tl.store(values + place + HALF, high.to(kind), mask=is_value[:, None])


@triton.jit
def _attend(
    queries, keys, values, part, stats, length, capacity, factor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One key head of one sequence, one split of its slots: softmax numerator, its greatest score and denominator."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    place = (pair * GROUP + row[:, None]) * WIDTH + column[None, :]
    query = tl.load(queries + place, mask=(row < GROUP)[:, None], other=0.0)
    greatest = tl.full((ROWS,), NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(STEPS):
        slot = (split * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = slot < length  # perhaps for no slot at all
        stored = (pair * capacity + slot[:, None]) * WIDTH + column[None, :]
        key = tl.load(keys + stored, mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(query, tl.trans(key)) * factor, NEVER)
        new = tl.maximum(greatest, tl.max(scores, 1))
        weight = tl.where(inside[None, :], tl.exp2(scores - new[:, None]), 0.0)
        shrink = tl.exp2(greatest - new)
        value = tl.load(values + stored, mask=inside[:, None], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * shrink + tl.sum(weight, 1)
        greatest = new
    own = (pair * SPLITS + split) * GROUP + row
    tl.store(part + own[:, None] * WIDTH + column[None, :], sums, mask=(row < GROUP)[:, None])
    tl.store(stats + own * 2, greatest, mask=row < GROUP)
    tl.store(stats + own * 2 + 1, total, mask=row < GROUP)


@triton.jit
def _combine(
    part, stats, out,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    own = (head // GROUP * SPLITS + split) * GROUP + head % GROUP
    inside = split < SPLITS
    greatest = tl.load(stats + own * 2, mask=inside, other=NEVER)
    total = tl.load(stats + own * 2 + 1, mask=inside, other=0.0)
    weight = tl.where(inside, tl.exp2(greatest - tl.max(greatest, 0)), 0.0)
    sums = tl.load(part + own[:, None] * WIDTH + column[None, :], mask=inside[:, None], other=0.0)
    y = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + head * WIDTH + column, y.to(out.dtype.element_ty))


def add_norm(
    update: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor | None
) -> None:
    rows, width = residual.shape
    block = triton.next_power_of_2(width)
    added = residual if update is None else update
    _add_norm[(rows,)](
        added, residual, weight, out, scale, eps, width, block, update is not None, scale is not None,
        num_warps=8, **_overlap(residual),
    )  # fmt: skip


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    rows, width = x.shape
    _quantize_rows[(rows,)](x, out, scale, width, triton.next_power_of_2(width), num_warps=8, **_overlap(x))


def silu_mul(gate_up: Tensor, out: Tensor, scale: Tensor | None) -> None:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    fp8 = scale is not None
    block = triton.next_power_of_2(width) if fp8 else min(triton.next_power_of_2(width), 2048)
    grid = (rows, triton.cdiv(width, block))
    _silu_mul[grid](gate_up, out, scale, width, block, fp8, num_warps=16 if fp8 else 4, **_overlap(gate_up))


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    keys: Tensor, values: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    sequences, kv_heads, capacity, width = keys.shape
    tokens = qkv.shape[0]
    every = heads + 2 * kv_heads
    rows = min(16 if tokens > 256 else 8, triton.next_power_of_2(every))  # few tokens: more programs
    queries = qkv.new_empty(tokens, heads, width)
    query_norm, key_norm = norms or (cos, cos)  # not read without norms
    _rope_append[(tokens, triton.cdiv(every, rows))](
        qkv, queries, keys, values, cos, sin, lengths, query_norm, key_norm, eps, tokens // sequences, capacity,
        heads, kv_heads, width, rows, norms is not None, num_warps=4, **_overlap(qkv),
    )  # fmt: skip
    return queries


def decode_attention(queries: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    sequences, heads, width = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    group, pairs = heads // kv_heads, sequences * kv_heads
    filled = 8 * _multiprocessors(queries.device)  # programs that keep the memory busy
    blocks = triton.cdiv(length, SLOTS)
    splits = max(1, min(MOST_SPLITS, triton.cdiv(filled, pairs), blocks))
    part = queries.new_empty(pairs * splits * group * width, dtype=torch.float32)
    stats = queries.new_empty(pairs * splits * group * 2, dtype=torch.float32)
    out = torch.empty_like(queries)
    _attend[(pairs, splits)](
        queries, keys, values, part, stats, length, capacity, LOG2_E * width**-0.5,
        group, max(QUERY_ROWS, triton.next_power_of_2(group)), width, SLOTS,
        triton.cdiv(blocks, splits), splits,
        num_warps=4, num_stages=3, **_overlap(queries),
    )  # fmt: skip
    _combine[(sequences * heads,)](
        part, stats, out, group, width, splits, max(2, triton.next_power_of_2(splits)), num_warps=4, **_overlap(queries)
    )
    return out.view(sequences, heads * width)


def _overlap(tensor: Tensor) -> dict[str, bool]:
    """Launch options: programmatic overlap from Hopper on."""
    on = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if on else {"OVERLAP": False}


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
