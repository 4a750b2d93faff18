"""One block of a decoder as fused ops, for one new token per row (decode) or for many (prefill)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant import ops
from mergequant.runtime.attention import causal_attention
from mergequant.runtime.cache import KVCache
from mergequant.runtime.parts import FusedGate, Norm, Projection

__all__ = ["Attention", "DecoderLayer", "GatedMLP", "Pass"]


@dataclass(frozen=True, eq=False)
class Pass:
    """What all layers of one run through the decoder share.

    Attributes:
        cos, sin: float32 (slots, head_width / 2).
        cache: keys and values; `lengths` says where the new ones go.
        lengths: int32 (B,), filled slots before this run.
        filled: int32 (B,), after it; only decode reads it.
        past: slots that every row has filled before a prefill; None for decode. At 0 the first tokens only
            hold the place of the stored prefix, if there is one: their keys and values are replaced by the stored.
        most: no row has more filled slots after a decode step (the kernels' splits are chosen for this many).
    """

    cos: Tensor
    sin: Tensor
    cache: KVCache
    lengths: Tensor
    filled: Tensor
    past: int | None
    most: int


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention behind one q/k/v GEMM, on a cache.

    Attributes:
        qkv: rows of q, then k, then v.
        output: the output projection.
        heads, kv_heads, head_width: as `DecoderShape`.
        scale: of the scores.
        query_norm, key_norm: float32 (head_width,) gains of the norms before the rotation, or None.
        eps: of those norms.
        prefix_key, prefix_value: (kv_heads, tokens, head_width) in the model's dtype: the stored prefix, which is read
            in place of the cache's first slots; None without a prefix.
    """

    qkv: Projection
    output: Projection
    heads: int
    kv_heads: int
    head_width: int
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None

    def __call__(self, x: Tensor, layer: int, run: Pass, dtype: torch.dtype) -> Tensor:
        """Codes or floats (B, S, width) of the first norm to (B, S, channels)."""
        qkv = self.qkv(x, dtype)
        cache, kv = run.cache, run.cache.format
        query, key = ops.kv_append(
            qkv, run.cos, run.sin, run.lengths, cache.keys[layer], cache.values[layer], kv.key_scale[layer],
            kv.value_scale[layer], self.query_norm, self.key_norm, self.eps, self.heads, kv.bits,
        )  # fmt: skip
        if run.past is None:
            return self._decode(query, layer, run, dtype)
        batch, length = query.shape[:2]
        value = qkv[..., (self.heads + self.kv_heads) * self.head_width :]
        value = value.view(batch, length, self.kv_heads, self.head_width)
        if not run.past and self.prefix_key is not None and self.prefix_value is not None:
            stored = self.prefix_key.shape[1]
            key[:, :stored], value[:, :stored] = self.prefix_key.transpose(0, 1), self.prefix_value.transpose(0, 1)
        past = self._past(layer, run, batch, dtype)
        out = causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), past, self.scale)
        return self.output(out.transpose(1, 2).reshape(batch, length, self.heads * self.head_width), dtype)

    def _decode(self, query: Tensor, layer: int, run: Pass, dtype: torch.dtype) -> Tensor:
        """One query per row (B, 1, heads, head_width) over the cache."""
        cache, kv = run.cache, run.cache.format
        quantizer = self.output.quantizer
        direct = quantizer is not None and quantizer.scales_only
        out = ops.kv_attention(
            query.squeeze(1), cache.keys[layer], cache.values[layer], run.filled, kv.key_scale[layer],
            kv.value_scale[layer], self.scale, kv.bits, run.most, self.prefix_key, self.prefix_value,
            quantizer.multiplier if quantizer is not None and direct else None,
            quantizer.bits if quantizer is not None and direct else 0,
            early=True,  # lengths and older slots were written before this step, or at its very beginning
        ).unsqueeze(1)  # fmt: skip
        return self.output.of_codes(out, None, dtype) if direct else self.output(out, dtype)

    def _past(self, layer: int, run: Pass, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys and values (B, kv_heads, past, head_width) of the slots that are filled: the prefix and the history."""
        past = run.past or 0
        if not past:
            return None
        stored = 0 if self.prefix_key is None else self.prefix_key.shape[1]
        parts: list[tuple[Tensor, Tensor]] = []
        if self.prefix_key is not None and self.prefix_value is not None:
            shape = (batch, *self.prefix_key.shape)
            parts.append((self.prefix_key.expand(shape), self.prefix_value.expand(shape)))
        if past > stored:
            cache, kv = run.cache, run.cache.format
            key, value = ops.kv_read(
                cache.keys[layer], cache.values[layer], kv.key_scale[layer], kv.value_scale[layer], past, kv.bits, dtype
            )
            parts.append((key[:, :, stored:], value[:, :, stored:]))
        keys, values = zip(*parts)
        return (torch.cat(keys, 2), torch.cat(values, 2)) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """SwiGLU: gate and up in one GEMM (with SwiGLU and down's quantizer in it where down's input allows), then down."""

    gate_up: Projection | FusedGate
    down: Projection

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes or floats (..., width) of the second norm to (..., channels)."""
        if isinstance(self.gate_up, FusedGate):
            return self.down.of_codes(self.gate_up(x), None, dtype)
        gate_up = self.gate_up(x, dtype)
        quantizer = self.down.quantizer
        if quantizer is None:
            return self.down(ops.silu_mul(gate_up), dtype)
        return self.down.of_codes(*quantizer.of_product(gate_up), dtype)


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """norm, attention, norm, MLP. What a sublayer adds to the residual is added by the norm that follows it."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: GatedMLP

    def __call__(self, x: Tensor | None, residual: Tensor, layer: int, run: Pass) -> Tensor:
        """Update the residual (B, S, channels) in place; takes and gives what is still to be added to it."""
        dtype = residual.dtype
        attended = self.attention(self.attention_norm(x, residual), layer, run, dtype)
        return self.mlp(self.mlp_norm(attended, residual), dtype)
