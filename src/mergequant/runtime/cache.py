"""KVCache: keys and values of all layers in fixed memory, in 16, 8 or 4 bits, and how full each row is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.ops.kv_layout import CAPACITY_MULTIPLE, cache_width

__all__ = ["KV_BITS", "KVCache", "KVFormat"]

KV_BITS = (16, 8, 4)


@dataclass(frozen=True, eq=False)
class KVFormat:
    """How keys and values are kept.

    Attributes:
        bits: 16 (the dtype of the hidden states), 8 or 4 (codes with static scales per head and channel).
        key_scale, value_scale: float32 (layers, kv_heads, head_width); unused at 16 bits.
    """

    bits: int
    key_scale: Tensor
    value_scale: Tensor

    def __post_init__(self) -> None:
        if self.bits not in KV_BITS:
            raise UsageError(f"a key/value cache of {self.bits} bits: choose one of {KV_BITS}")

    @property
    def quantized(self) -> bool:
        return self.bits < 16


@dataclass(frozen=True, eq=False)
class KVCache:
    """Fixed buffers, so that a CUDA graph may hold their addresses.

    Attributes:
        keys, values: per layer, (B, kv_heads, capacity, head_width) in the model's dtype, or uint8
            (B, kv_heads, capacity, head_width * bits / 8) in the kernels' own order.
        lengths: int32 (B,), filled slots of each row. The slot of a token is its position.
        format: bits and scales.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    format: KVFormat

    @staticmethod
    def allocate(
        layers: int, batch: int, kv_heads: int, head_width: int, capacity: int, kv: KVFormat, dtype: torch.dtype
    ) -> "KVCache":
        """An empty cache on the device of the scales.

        Raises:
            UsageError: a capacity that is no multiple of 64.
            KernelError: a head width that quantized caches do not hold.
        """
        if capacity < 1 or capacity % CAPACITY_MULTIPLE:
            raise UsageError(f"a cache of {capacity} slots: capacities are multiples of {CAPACITY_MULTIPLE}")
        device = kv.key_scale.device
        width = cache_width(head_width, kv.bits) if kv.quantized else head_width

        def buffers() -> list[Tensor]:
            # Zeros, not whatever was there: kernels read whole blocks, and 0 * NaN of an unused slot would be NaN.
            shape = (batch, kv_heads, capacity, width)
            return [
                torch.zeros(shape, dtype=torch.uint8 if kv.quantized else dtype, device=device) for _ in range(layers)
            ]

        return KVCache(buffers(), buffers(), torch.zeros(batch, dtype=torch.int32, device=device), kv)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def rows(self, start: int, stop: int) -> "KVCache":
        """Some of the rows, in the same memory."""
        return KVCache(
            [key[start:stop] for key in self.keys],
            [value[start:stop] for value in self.values],
            self.lengths[start:stop],
            self.format,
        )
