"""PrefixStore: keys and values of the outlier tokens, computed once and put into every cache.

Attention sinks such as BOS carry activations many times larger than any other token's; a static scale that covers them
wastes its grid on everything else. Their keys and values do not depend on what follows, so they are computed once in
floating point and stored (PrefixQuant; the project's `docs/design.md` says how prompts are served).
"""

from typing import Any

import torch
from torch import Tensor

from mergequant.nn.base import QuantModule
from mergequant.nn.spec import PrefixSpec

__all__ = ["PrefixStore"]


class PrefixStore(QuantModule):
    """Keys, values and final hidden states of a fixed prefix.

    Buffers:
        keys: float32 (layers, kv_heads, tokens, key_width), after rotary embedding.
        values: float32 (layers, kv_heads, tokens, value_width).
        hidden: float32 (tokens, channels), the decoder's output (after the final norm).
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor

    def __init__(self, spec: PrefixSpec) -> None:
        super().__init__()
        self.spec = spec
        count = len(spec.tokens)
        self.register_buffer("keys", torch.zeros(spec.layers, spec.kv_heads, count, spec.key_width))
        self.register_buffer("values", torch.zeros(spec.layers, spec.kv_heads, count, spec.value_width))
        self.register_buffer("hidden", torch.zeros(count, spec.channels))
        for name in ("keys", "values", "hidden"):
            buffer = getattr(self, name)
            setattr(self, name, buffer.to(torch.float32))

    def fill(self, cache: Any, batch: int, dtype: torch.dtype) -> None:
        """Append the prefix to an empty cache (transformers' `Cache`), for `batch` rows."""
        for layer in range(self.spec.layers):
            keys = self.keys[layer].to(dtype).expand(batch, -1, -1, -1)
            values = self.values[layer].to(dtype).expand(batch, -1, -1, -1)
            cache.update(keys, values, layer)
