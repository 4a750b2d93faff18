"""Decoder: embedding, layers, final norm and head, run on a cache: whole prompts, or one token per row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergequant.errors import InputError
from mergequant.nn import PrefixStore
from mergequant.ops.kv_layout import CAPACITY_MULTIPLE
from mergequant.ops.overlap import overlapping
from mergequant.runtime.attention import fast_kernels
from mergequant.runtime.cache import KVCache, KVFormat
from mergequant.runtime.layer import DecoderLayer, Pass
from mergequant.runtime.parts import FloatNorm
from mergequant.runtime.shape import DecoderShape

__all__ = ["Decoder"]


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder of fused ops. It shares its tensors with the model that it was taken from.

    Attributes:
        shape: its numbers.
        embedding: (vocabulary, channels) in the dtype of the hidden states.
        layers: the blocks.
        norm: the final one.
        head: (vocabulary, channels).
        cos, sin: float32 (shape.slots, head_width / 2).
        kv: how keys and values are cached.
        prefix: stored prefix that every sequence begins with, or None.
    """

    shape: DecoderShape
    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: FloatNorm
    head: Tensor
    cos: Tensor
    sin: Tensor
    kv: KVFormat
    prefix: PrefixStore | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def prefix_tokens(self) -> int:
        """Slots that the stored prefix fills in every row."""
        return 0 if self.prefix is None else len(self.prefix.spec.tokens)

    @torch.no_grad()
    def new_cache(self, batch: int, slots: int) -> KVCache:
        """A cache of at least `slots` slots a row (rounded up to a multiple of 64), as after `clear`.

        Raises:
            InputError: more slots than the model has positions.
        """
        shape = self.shape
        capacity = -(-slots // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        if capacity > shape.slots:
            raise InputError(f"a cache of {slots} slots: the model has {shape.positions} positions")
        cache = KVCache.allocate(shape.layers, batch, shape.kv_heads, shape.head_width, capacity, self.kv, self.dtype)
        self.clear(cache)
        return cache

    def clear(self, cache: KVCache) -> None:
        """Forget all sequences; the prefix, which layers hold themselves, counts as filled slots."""
        cache.lengths.fill_(self.prefix_tokens)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: KVCache, counts: Tensor | None = None, past: int | None = None) -> Tensor:
        """Run tokens of all rows, and say what follows the last one of each.

        Waits for nothing on the device, so that it may be captured in a graph.

        Args:
            tokens: int64 (B, S), padded on the right; without the prefix. Padding is written to slots that the next
                tokens overwrite, and no real token sees it.
            cache: with room for all; its lengths become past (or the prefix's tokens) + counts.
            counts: int64 (B,) on the device, real tokens of each row, at least 1; None: S.
            past: slots that every row has filled already, by earlier pieces of its text; None: this is the first.

        Returns:
            Logits (B, vocabulary) in the model's dtype.

        Raises:
            InputError: more tokens than slots or positions.
        """
        # Any tokens come along to hold the prefix's place: attention stays square, which its fast kernels want.
        skip = self.prefix_tokens if past is None else 0
        tokens = nn.functional.pad(tokens, (skip, 0))
        start, (batch, length) = past or 0, tokens.shape
        room = min(cache.capacity, self.shape.slots)
        if start + length > room:
            raise InputError(f"{start} filled slots and {length} tokens do not fit into {room} slots")
        before = torch.full_like(cache.lengths, start)
        run = Pass(self.cos, self.sin, cache, before, before, start, start + length)
        residual = nn.functional.embedding(tokens, self.embedding)
        x = self._body(residual, run)
        if counts is None:
            counts = torch.full_like(before, length - skip, dtype=torch.int64)
        place = (counts + (skip - 1)).clamp(0, length - 1)[:, None, None].expand(batch, 1, residual.shape[-1])
        logits = self._logits(x.gather(1, place), residual.gather(1, place))
        cache.lengths.copy_(counts + (start + skip))
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache, most: int | None = None) -> Tensor:
        """Run one more token of every row: int64 (B,) to logits (B, vocabulary). Lengths grow by 1.

        Waits for nothing on the device. The caller keeps lengths below the cache's capacity and the positions.

        Args:
            tokens: of each row.
            cache: filled so far.
            most: upper bound of the lengths afterwards, for choosing how attention is split; None: the capacity.
        """
        filled = cache.lengths + 1
        run = Pass(self.cos, self.sin, cache, cache.lengths, filled, None, most or cache.capacity)
        residual = nn.functional.embedding(tokens[:, None], self.embedding)
        logits = self._logits(self._body(residual, run), residual)
        cache.lengths.copy_(filled)
        return logits

    @torch.no_grad()
    def run_layer(self, number: int, hidden: Tensor, steps: int) -> Tensor:
        """One layer alone, on an empty cache, for comparing it with another implementation.

        Args:
            number: which layer.
            hidden: (B, S, channels) that go into it, S > steps.
            steps: this many of the last tokens are run one by one, the others before them at once.

        Returns:
            (B, S, channels) that come out.
        """
        cache = self.new_cache(hidden.shape[0], self.prefix_tokens + hidden.shape[1])
        layer, start = self.layers[number], 0
        outputs: list[Tensor] = []
        whole = nn.functional.pad(hidden, (0, 0, self.prefix_tokens, 0))  # places for the prefix, as in `prefill`
        for piece in (whole[:, :-steps], *whole[:, -steps:].split(1, 1)):
            residual, length = piece.contiguous().clone(), piece.shape[1]
            before = torch.full_like(cache.lengths, start)
            run = Pass(self.cos, self.sin, cache, before, before + 1, None if outputs else 0, cache.capacity)
            with fast_kernels():
                x = layer(None, residual, number, run)
            outputs.append(residual + x)
            start += length
        return torch.cat(outputs, 1)[:, self.prefix_tokens :]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on (..., channels) that come out of the last layer."""
        return nn.functional.linear(self.norm(None, hidden.contiguous()), self.head)

    @torch.no_grad()
    def logits_of_prefix(self) -> Tensor:
        """Logits (vocabulary,) of what follows the stored prefix, for a prompt that holds nothing else."""
        if self.prefix is None:
            raise InputError("the prompt is empty, and there is no stored prefix to go on from")
        return nn.functional.linear(self.prefix.hidden[-1].to(self.dtype), self.head)

    def _body(self, residual: Tensor, run: Pass) -> Tensor:
        """All layers on (B, S, channels): the residual is updated in place, the last sublayer's output returned."""
        x: Tensor | None = None
        with fast_kernels(), overlapping():
            for number, layer in enumerate(self.layers):
                x = layer(x, residual, number, run)
        assert x is not None  # a shape has at least one layer
        return x

    def _logits(self, x: Tensor, residual: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(x, residual).squeeze(1), self.head)
