"""Keys and values of 8 or 4 bits in vLLM's paged cache: what a layer holds for them, and what it does in a step.

Knows tensors and this project's modules only, nothing of vLLM, so that a machine without a GPU can test it;
`attention.py` brings the pages, and what the scheduler decided.

A step first stores the codes of its tokens. Rows with one token (decoding) then attend to codes. Rows with several
attend in floats, as in the fast loop of `mergequant.load`: to the keys and values of this very step as they are, and to
those that were stored before decoded. Where nothing was stored before, nothing is decoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.checkpoint import expected_tensors
from mergequant.errors import UsageError
from mergequant.integrations.vllm.placement import Place, Placement
from mergequant.integrations.vllm.shards import Share, rows_of
from mergequant.integrations.vllm.sink import Sink
from mergequant.nn import KVSpec
from mergequant.nn.kv_scales import KV_BITS
from mergequant.ops import kv_layout
from mergequant.ops._kv import unserved

__all__ = [
    "FLOAT_BITS",
    "OPTION",
    "PAGE",
    "CacheSteps",
    "LayerPages",
    "Prompts",
    "Step",
    "chosen_bits",
    "plan_step",
    "require_servable",
]

OPTION = "kv_bits"  # of --additional-config
FLOAT_BITS = 16  # vLLM's own caches
PAGE = kv_layout.CAPACITY_MULTIPLE  # tokens of a page, or a multiple
LEAST_ROOM = 8192  # tokens whose keys and values are decoded at once
WARM_ROWS, WARM_TOKENS = (1, 512), (PAGE, 4 * PAGE, 16 * PAGE)  # sizes at which kernels differ
WAY_OUT = f"leave out {OPTION} to use vLLM's own caches (--kv-cache-dtype)"

# query, key, value, out (tokens, heads, width); where rows' queries and where their keys begin, int32 (rows + 1,); most
# queries and most keys of a row; factor of the scores. Causal: the last query of a row sees all its keys.
Flash = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Any]


def chosen_bits(options: Any, cache_dtype: str) -> int:
    """Bits of keys and values that --additional-config asks for; 16: vLLM's own cache.

    Raises:
        UsageError: other bits, or beside a --kv-cache-dtype.
    """
    bits = options.get(OPTION, FLOAT_BITS) if isinstance(options, Mapping) else FLOAT_BITS
    if bits not in (FLOAT_BITS, *KV_BITS):
        raise UsageError(f"{OPTION} is {bits!r}; choose {FLOAT_BITS} (vLLM's own cache), 8 or 4")
    if bits != FLOAT_BITS and cache_dtype != "auto":
        raise UsageError(f"{OPTION}={bits} and --kv-cache-dtype {cache_dtype} ask for two caches; leave one out")
    return int(bits)


def require_servable(spec: KVSpec | None, heads: int, kv_heads: int, width: int) -> KVSpec:
    """The steps' description, if a model of such heads can be served with them; else UsageError."""
    if spec is None:
        raise UsageError(f"the checkpoint stores no steps for a quantized cache; quantize it anew, or {WAY_OUT}")
    if spec.key_rotation:
        raise UsageError(
            f"the checkpoint's keys are quantized behind a rotation ({spec.key_rotation}), which the kernels on pages "
            f"do not know; quantize it without the step rotate_keys, or {WAY_OUT}"
        )
    if (spec.key_width, spec.value_width) != (width, width):
        raise UsageError(f"heads are {width} wide, the stored steps {spec.key_width} and {spec.value_width}; {WAY_OUT}")
    if reason := unserved(width, heads // kv_heads, torch.bfloat16, KV_BITS[0])["cuda"]:
        raise UsageError(f"no kernel for this model's quantized cache: {reason}; {WAY_OUT}")
    return spec


@dataclass(frozen=True, eq=False)
class Prompts:
    """Neighbouring rows with several tokens in a step.

    Attributes:
        rows: which.
        queries: int32 (rows + 1,): where their tokens begin among the step's.
        longest: most tokens of a row in this step.
        starts: int32 (rows + 1,): where rows begin, one behind the other, with what was stored before; None: no row
            had anything stored.
        tokens: of all rows then.
        most: of a row then.
    """

    rows: slice
    queries: Tensor
    longest: int
    starts: Tensor | None
    tokens: int
    most: int


@dataclass(frozen=True, eq=False)
class Step:
    """What all layers of one step share.

    Attributes:
        slots: int64 (tokens,): where tokens are stored; -1: nowhere.
        table: int32 (rows, pages).
        lengths: int32 (rows,), this step's tokens included.
        decodes: so many rows, the first ones, have one token.
        most: upper bound of their lengths.
        prompts: the other rows.
    """

    slots: Tensor
    table: Tensor
    lengths: Tensor
    decodes: int
    most: int
    prompts: tuple[Prompts, ...]


def plan_step(
    slots: Tensor,
    table: Tensor,
    lengths: Tensor,
    queries: Tensor,
    query_starts: Sequence[int],
    known_lengths: Sequence[int],
    decodes: int,
    most: int,
    room: int,
    send: Callable[[list[int]], Tensor],
) -> Step:
    """A step from what a scheduler knows.

    Args:
        slots, table, lengths, decodes, most: as in `Step`.
        queries: int32 (rows + 1,): where rows' tokens begin among the step's.
        query_starts, known_lengths: the same, and the lengths, as numbers; those of decoding rows are not looked at.
        room: tokens that may be decoded at once; no row is longer.
        send: numbers to an int32 tensor beside the others.
    """
    count = len(known_lengths)
    fresh = [query_starts[row + 1] - query_starts[row] for row in range(count)]
    prompts = []
    if all(known_lengths[row] == fresh[row] for row in range(decodes, count)):
        longest = max(fresh[decodes:], default=0)
        if count > decodes:
            prompts = [Prompts(slice(decodes, count), queries[decodes:], longest, None, query_starts[-1], longest)]
    else:
        first = decodes
        while first < count:
            starts, last = [0], first
            while last < count and (last == first or starts[-1] + known_lengths[last] <= room):
                starts.append(starts[-1] + known_lengths[last])
                last += 1
            own = slice(first, last)
            sizes = max(fresh[own]), send(starts), starts[-1], max(known_lengths[own])
            prompts.append(Prompts(own, queries[first : last + 1], *sizes))
            first = last
    return Step(slots, table, lengths, decodes, most, tuple(prompts))


class CacheSteps(nn.Module):
    """Static steps of the own key heads of all layers, and room to decode stored tokens.

    Buffers:
        key_scale, value_scale: float32 (layers, own kv_heads, width).
    """

    key_scale: Tensor
    value_scale: Tensor

    def __init__(
        self, name: str, spec: KVSpec, bits: int, kv_heads: int, share: Share, dtype: torch.dtype, most_tokens: int
    ) -> None:
        """`most_tokens`: of a row; `dtype`: of keys and values as floats."""
        super().__init__()
        self.name, self.spec, self.bits = name, spec, bits
        self.start = rows_of(name, spec.kv_heads, kv_heads, share)
        for part in ("key", "value"):
            scale = torch.ones(spec.layers, kv_heads, spec.key_width, dtype=torch.float32)
            self.register_buffer(f"{part}_scale", scale, persistent=False)
        self.most_tokens = most_tokens
        self.room = max(most_tokens, LEAST_ROOM)
        # Taken while the model is built, so that vLLM counts it before it gives the rest to the cache.
        self.rooms = tuple(torch.empty(self.room, kv_heads, spec.key_width, dtype=dtype) for _ in range(2))

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in one layer on this GPU."""
        return 2 * self.key_scale.shape[1] * kv_layout.cache_width(self.spec.key_width, self.bits)

    def place(self, placement: Placement) -> None:
        """Tell the loader where the steps go: on every GPU those of its own heads; those of other bits go nowhere."""
        for full, (dtype, shape) in expected_tensors(self.name, self.spec).items():
            part, _, bits = full.removeprefix(self.name + ".").rpartition("_")
            own = int(bits) == self.bits
            placement.add(full, Place(getattr(self, part), dtype, shape, 1, self.start) if own else None)


class LayerPages:
    """What attention of one layer does with its pages, uint8 (pages, 2, own kv_heads, page, bytes)."""

    def __init__(self, steps: CacheSteps, layer: int, sink: Sink | None) -> None:
        self.steps, self.layer, self.sink = steps, layer, sink
        self.bits = steps.bits
        self.scales = steps.key_scale[layer], steps.value_scale[layer]  # views: they are filled with the rest
        self.prefix: tuple[Tensor | None, Tensor | None] = (None, None)

    def finish(self, dtype: torch.dtype) -> None:
        """All is loaded: the stored token in the model's dtype."""
        if self.sink is not None:
            self.prefix = self.sink.keys[self.layer].to(dtype), self.sink.values[self.layer].to(dtype)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Tensor,
        step: Step,
        out: Tensor,
        scale: float,
        flash: Flash,
    ) -> None:
        """Store keys and values (tokens, kv_heads, width) of a step, and attend to them and to what was stored.

        query and out: (tokens, heads, width), tokens in the order of the rows. A stored token's value is put in place.
        """
        count = min(key.shape[0], step.slots.shape[0])  # both may be padded
        k, v, slots = (_first(x, count) for x in (key, value, step.slots))
        ops.kv_store(k, v, slots, pages, *self.scales, self.bits, *self.prefix)
        if step.decodes:
            q, table, lengths, own = (_first(x, step.decodes) for x in (query, step.table, step.lengths, out))
            ops.kv_page_attention(
                q, pages, table, lengths, *self.scales, scale, self.bits, step.most, own, *self.prefix
            )
        for prompts in step.prompts:
            keys, values, starts = key, value, prompts.queries
            if prompts.starts is not None:
                keys, values = (room[: prompts.tokens] for room in self.steps.rooms)
                starts = prompts.starts
                ops.kv_page_read(
                    *(pages, step.table[prompts.rows], starts, key, value, prompts.queries, *self.scales, self.bits),
                    *(prompts.most, keys, values, *self.prefix),
                )
            flash(query, keys, values, out, prompts.queries, starts, prompts.longest, prompts.most, scale)

    def warm(self, heads: int, dtype: torch.dtype) -> None:
        """Run the kernels once, for `heads` query heads: neither a request nor a captured graph shall compile one."""
        kv_heads, width = self.scales[0].shape
        device, most = self.scales[0].device, self.steps.most_tokens
        shape = (1, 2, kv_heads, PAGE, kv_layout.cache_width(width, self.bits))
        pages = torch.zeros(shape, dtype=torch.uint8, device=device)
        bounds = torch.arange(2, dtype=torch.int32, device=device)
        for rows in WARM_ROWS:
            query, out = torch.zeros(2, rows, heads, width, dtype=dtype, device=device)
            key, value = torch.zeros(2, rows, kv_heads, width, dtype=dtype, device=device)
            slots = torch.full((rows,), -1, device=device)
            table = torch.zeros(rows, 2 * -(-most // (2 * PAGE)), dtype=torch.int32, device=device)
            lengths = torch.zeros(rows, dtype=torch.int32, device=device)
            prompts = Prompts(slice(0, 1), bounds, 1, bounds, 1, 1)
            for longest in (*WARM_TOKENS, most):
                step = Step(slots, table, lengths, rows, min(longest, most), (prompts,))
                self.attend(query, key, value, pages, step, out, 1.0, lambda *_: None)


def _first(x: Tensor, count: int) -> Tensor:
    """The first `count` of x; a view costs time where an engine waits for Python."""
    return x if x.shape[0] == count else x[:count]
