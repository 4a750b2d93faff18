"""KVScales: the static steps of a quantized cache of keys and values, one per layer, head and channel.

Static steps need no search while text is generated, and a channel's step leaves the sums of attention: that of a key
channel is multiplied into the query, that of a value channel into the output.
"""

import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.nn.base import QuantModule
from mergequant.nn.linear import check_rotation
from mergequant.nn.spec import KVSpec

__all__ = ["KV_BITS", "KVScales"]

KV_BITS = (8, 4)


class KVScales(QuantModule):
    """Steps of quantized keys (after rotary embedding) and values. Codes are symmetric: -127..127 and -7..7.

    With `spec.key_rotation` the steps are those of the keys of each head times that rotation.

    Buffers:
        key_scale_8, key_scale_4: float32 (layers, kv_heads, key_width), positive.
        value_scale_8, value_scale_4: float32 (layers, kv_heads, value_width), positive.
    """

    key_scale_8: Tensor
    value_scale_8: Tensor
    key_scale_4: Tensor
    value_scale_4: Tensor

    def __init__(self, spec: KVSpec) -> None:
        super().__init__()
        check_rotation(spec.key_rotation, spec.key_width)
        self.spec = spec
        keys = (spec.layers, spec.kv_heads, spec.key_width)
        values = (spec.layers, spec.kv_heads, spec.value_width)
        for bits in KV_BITS:
            self.register_buffer(f"key_scale_{bits}", torch.ones(keys, dtype=torch.float32))
            self.register_buffer(f"value_scale_{bits}", torch.ones(values, dtype=torch.float32))

    def steps(self, layer: int, bits: int) -> tuple[Tensor, Tensor]:
        """Steps of the keys (kv_heads, key_width) and of the values (kv_heads, value_width) of one layer.

        Raises:
            InputError: bits for which no steps are stored.
        """
        if bits not in KV_BITS:
            raise InputError(f"a quantized cache has {' or '.join(map(str, KV_BITS))} bits, not {bits}")
        return getattr(self, f"key_scale_{bits}")[layer], getattr(self, f"value_scale_{bits}")[layer]

    def extra_repr(self) -> str:
        spec = self.spec
        rotated = f", keys rotated by {spec.key_rotation}" if spec.key_rotation else ""
        return f"{spec.layers} layers, {spec.kv_heads} heads, widths {spec.key_width} and {spec.value_width}{rotated}"
