"""QuantizedCache: keys and values of 8 or 4 bits behind transformers' own `Cache` interface, for any architecture.

This is the readable way, not the fast one: codes lie row after row, and `update` decodes the whole history for the
model's own attention. What attention sees is what it sees while text is generated one token at a time: every token,
the newest too, has been rounded. A single pass over a text therefore measures the quantized cache exactly.

Where a checkpoint says so (`KVSpec.key_rotation`), keys are rounded in a rotated basis and rotated back for attention.

The keys and values of a stored prefix stay in floating point: attention sinks are what a static step serves worst.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from mergequant import ops
from mergequant.checkpoint import KV_MODULE, PREFIX_MODULE
from mergequant.errors import InputError
from mergequant.grids import pack_codes, unpack_codes
from mergequant.nn import KVScales, PrefixStore
from mergequant.ops import kv_layout

__all__ = ["QuantizedCache", "QuantizedLayer"]


class QuantizedCache(Cache):
    """A cache of quantized keys and values: pass it as `past_key_values` to a forward pass or to `generate`.

        cache = QuantizedCache.for_model(model, bits=4)
        model.generate(**tokens, past_key_values=cache)

    Layers with a sliding window keep all their tokens; the model's masks hide what lies outside the window.
    """

    @classmethod
    def for_model(cls, model: nn.Module, bits: int = 8, capacity: int | None = None) -> "QuantizedCache":
        """An empty cache for one batch.

        Args:
            model: a loaded checkpoint.
            bits: 8 or 4.
            capacity: tokens to reserve room for at once, a prefix's included; None: the cache grows.

        Raises:
            InputError: the checkpoint stores no steps, or none of these bits.
        """
        scales = _find(model, KV_MODULE, KVScales)
        if scales is None:
            raise InputError(
                f"{type(model).__name__} has no steps for a quantized cache: it is a float model, its blocks keep no "
                "keys and values, or its checkpoint has format 1.0; quantize it with this release"
            )
        if capacity is not None and capacity < 1:
            raise InputError(f"a cache with room for {capacity} tokens: give a positive number, or None to let it grow")
        prefix = _find(model, PREFIX_MODULE, PrefixStore)
        exempt = 0 if prefix is None else len(prefix.spec.tokens)
        steps = [scales.steps(layer, bits) for layer in range(scales.spec.layers)]
        rotates = bool(scales.spec.key_rotation)
        return cls(layers=[QuantizedLayer(keys, values, bits, exempt, capacity, rotates) for keys, values in steps])


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer. The first `exempt` tokens (the prefix) lie apart, in the model's dtype."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        key_scale: Tensor,
        value_scale: Tensor,
        bits: int,
        exempt: int = 0,
        capacity: int | None = None,
        rotates_keys: bool = False,
    ) -> None:
        """key_scale, value_scale: float32 (kv_heads, width), of rotated keys if `rotates_keys`; the others as in
        `QuantizedCache.for_model`."""
        super().__init__()
        self.max_cache_len = capacity
        halves = ((key_scale, rotates_keys), (value_scale, False))
        self._halves = [_Half(scale, bits, exempt, capacity, rotates) for scale, rotates in halves]
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty tensors like the states that arrive."""
        for half, states in zip(self._halves, (key_states, value_states)):
            half.start(states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens (batch, kv_heads, tokens, width); returns all tokens as attention shall see them, in their dtype.

        Raises:
            InputError: the reserved room is used up.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        needed = self._length + key_states.shape[2]
        if self.max_cache_len is not None and needed > self.max_cache_len:
            raise InputError(
                f"the quantized cache has room for {self.max_cache_len} tokens, {needed} are needed (a stored prefix "
                "takes some); make it larger, or leave out capacity"
            )
        keys, values = (
            half.add(states, self._length) for half, states in zip(self._halves, (key_states, value_states))
        )
        self._length = needed
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that are held, the prefix's included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that `update` will return, and the place of the first of them."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that there is room for; -1 for a cache that grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length  # its name in older releases of transformers

    def reset(self) -> None:
        """Forget everything, the prefix too: the next forward pass puts it back."""
        self.is_initialized = False
        self._length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number. A positive one is the length to keep, as it once was."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self._length, 0)
        self._length = max(self._length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, for beam search."""
        self._pick(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._pick(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows."""
        self._pick(lambda part: part[indices])

    def _pick(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for half in self._halves:
                half.first, half.codes = rows(half.first), rows(half.codes)


class _Half:
    """The keys, or the values, of one layer.

    first: (batch, kv_heads, up to `exempt` tokens, width) as they came.
    codes: (batch, kv_heads, tokens or reserved room, bytes) of all later tokens, two 4-bit codes a byte.
    rotation: (width, width), what later tokens are multiplied by before they are rounded; None: nothing.
    """

    first: Tensor
    codes: Tensor
    rotation: Tensor | None = None

    def __init__(self, scale: Tensor, bits: int, exempt: int, capacity: int | None, rotates: bool) -> None:
        self.scale, self.bits, self.exempt, self.capacity = scale[:, None], bits, exempt, capacity
        self.rotates = rotates

    def start(self, states: Tensor) -> None:
        """Empty tensors like `states`."""
        self.scale = self.scale.to(states.device)
        if self.rotates:
            self.rotation = ops.rotation(states.shape[3]).matrix().to(states.device, _wide(states.dtype))
        self.first = states[:, :, :0]
        room = 0 if self.capacity is None else max(self.capacity - self.exempt, 0)
        empty = self._encode(self.first)
        self.codes = empty.new_empty(*empty.shape[:2], room, empty.shape[3])

    def add(self, states: Tensor, length: int) -> Tensor:
        """Put `states` behind the first `length` tokens; returns all of them, decoded."""
        apart = min(max(self.exempt - length, 0), states.shape[2])
        self.first = torch.cat([self.first[:, :, :length], states[:, :, :apart]], 2)
        start = max(length - self.exempt, 0)
        fresh = self._encode(states[:, :, apart:])
        stop = start + fresh.shape[2]
        if self.capacity is None:
            self.codes = torch.cat([self.codes[:, :, :start], fresh], 2)
        else:
            self.codes[:, :, start:stop] = fresh
        decoded = unpack_codes(self.codes[:, :, :stop], self.bits) * self.scale
        if self.rotation is not None:
            decoded = decoded.to(self.rotation.dtype) @ self.rotation.t()
        return torch.cat([self.first, decoded.to(states.dtype)], 2)

    def _encode(self, states: Tensor) -> Tensor:
        wide = states.to(_wide(states.dtype))
        if self.rotation is not None:
            wide = wide @ self.rotation
        return pack_codes(kv_layout.quantize(wide, self.scale, self.bits), self.bits)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What states of this dtype are rounded in: float32, or their own float64."""
    return torch.promote_types(dtype, torch.float32)


def _find(model: nn.Module, name: str, kind: type) -> Any:
    """The module of this name and class, wherever it hangs in the model."""
    found = (module._modules.get(name) for module in model.modules())
    return next((module for module in found if isinstance(module, kind)), None)
