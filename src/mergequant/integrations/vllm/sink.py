"""A stored first token (BOS) in vLLM: its keys, values and hidden state are put where the token stands.

Its activations are many times larger than any other token's, and static steps do not cover them, so what a checkpoint
stores is used instead of what the quantized model would compute. vLLM's cache cannot begin with something that no
prompt holds; but a prompt that begins with the token itself has a row for it at position 0, and that row's keys and
values are the stored ones.

The row is marked by position -1, from outside of the compiled model. Behind the rotary embedding its key becomes the
stored one; in front of attention a row whose key *is* the stored one gets the stored value. Both are plain selections
of rows: they follow every batch, chunk and captured graph.
"""

import torch
from torch import Tensor, nn

from mergequant.checkpoint import expected_tensors
from mergequant.errors import InputError, UsageError
from mergequant.integrations.vllm.placement import Place, Placement
from mergequant.integrations.vllm.shards import Share, rows_of
from mergequant.nn import PrefixSpec

__all__ = ["Sink", "SinkAttention", "SinkRotary", "require_sink"]

MARK = -1  # position of the stored token


def require_sink(spec: PrefixSpec) -> None:
    """Raise UsageError for a prefix that no prompt of vLLM's can hold."""
    if len(spec.tokens) != 1:
        raise UsageError(
            f"the checkpoint's prefix has {len(spec.tokens)} tokens, and vLLM has no place for tokens that a prompt "
            "does not hold; quantize the model with `--set prefix=bos`, or use `mergequant generate`"
        )


class Sink(nn.Module):
    """The stored token of a model.

    Buffers:
        keys, values: float32 (layers, own kv_heads, 1, width).
        hidden: float32 (1, channels).
        marked: int64 (most tokens of a step,): positions, at an address that captured graphs may keep.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor
    marked: Tensor

    def __init__(self, name: str, spec: PrefixSpec, kv_heads: int, share: Share, most_tokens: int) -> None:
        super().__init__()
        require_sink(spec)
        self.name, self.spec = name, spec
        self.start = rows_of(name, spec.kv_heads, kv_heads, share)
        shapes = {
            "keys": (spec.layers, kv_heads, 1, spec.key_width),
            "values": (spec.layers, kv_heads, 1, spec.value_width),
            "hidden": (1, spec.channels),
        }
        for part, shape in shapes.items():
            self.register_buffer(part, torch.zeros(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("marked", torch.zeros(most_tokens, dtype=torch.int64), persistent=False)

    def place(self, placement: Placement) -> None:
        """Tell the loader where the stored tensors go: on every GPU its own heads."""
        for full, (dtype, shape) in expected_tensors(self.name, self.spec).items():
            part = full.removeprefix(self.name + ".")
            cut = part != "hidden"
            placement.add(full, Place(getattr(self, part), dtype, shape, 1 if cut else None, self.start if cut else 0))

    def find(self, ids: Tensor | None, positions: Tensor) -> Tensor:
        """Which rows (tokens,) are the stored token at the start of a prompt.

        Raises:
            InputError: no token ids, but embeddings.
        """
        if ids is None:
            raise InputError("a checkpoint with a stored prefix needs prompts of token ids, not of embeddings")
        return (positions == 0) & (ids == self.spec.tokens[0])

    def mark(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Positions (tokens,) with these rows marked; always at the same address."""
        own = self.marked[: positions.shape[0]]
        own.copy_(torch.where(rows, MARK, positions))
        return own

    def put(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """The stored final state in these rows of (tokens, channels)."""
        return torch.where(rows[:, None], self.hidden.to(hidden.dtype), hidden)


class SinkRotary(nn.Module):
    """A rotary embedding behind which marked rows get the stored key of a layer."""

    key: Tensor

    def __init__(self, inner: nn.Module, sink: Sink, layer: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("key", sink.keys[layer].flatten(), persistent=False)  # a view: it is filled with the rest

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """positions (tokens,), query and key (tokens, heads * width)."""
        query, key = self.inner(positions.clamp(min=0), query, key)
        return query, torch.where((positions == MARK)[:, None], self.key.to(key.dtype), key)


class SinkAttention(nn.Module):
    """Attention in front of which rows with the stored key get the stored value of a layer."""

    key: Tensor
    value: Tensor

    def __init__(self, inner: nn.Module, sink: Sink, layer: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("key", sink.keys[layer].flatten(), persistent=False)
        self.register_buffer("value", sink.values[layer].flatten(), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value (tokens, heads * width) to (tokens, heads * width)."""
        stored = (key == self.key.to(key.dtype)).all(-1, keepdim=True)
        return self.inner(query, key, torch.where(stored, self.value.to(value.dtype), value))
