"""DecoderShape: the numbers that make a decoder, and the rotary table that follows from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.ops.kv_layout import CAPACITY_MULTIPLE

__all__ = ["DecoderShape", "rotary_table"]


@dataclass(frozen=True)
class DecoderShape:
    """A pre-norm decoder: RMSNorm, rotary embedding in halves, grouped query heads, SwiGLU.

    Attributes:
        layers: blocks.
        channels: width of the hidden states.
        heads, kv_heads: query heads, and the key and value heads that they share.
        head_width: channels of one head.
        ffn: channels between gate/up and down.
        vocabulary: rows of embedding and head.
        positions: most tokens of a sequence.
        eps: added to the mean square in the norms.
        rope_theta: base of the rotary frequencies.
        qk_norm: queries and keys of every head pass an RMSNorm before the rotation (Qwen3).
        qkv_bias: q, k and v have biases (Qwen2).

    Raises:
        UsageError: numbers that make no decoder.
    """

    layers: int
    channels: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocabulary: int
    positions: int
    eps: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = False
    qkv_bias: bool = False

    @property
    def slots(self) -> int:
        """Largest capacity of a cache: the positions, in whole blocks of slots. The rotary table covers them."""
        return -(-self.positions // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE

    def __post_init__(self) -> None:
        counts = (self.layers, self.channels, self.heads, self.kv_heads, self.ffn, self.vocabulary, self.positions)
        if min(counts) < 1 or self.head_width < 2:
            raise UsageError(f"{self}: every count must be at least 1, head_width at least 2")
        if self.heads % self.kv_heads or self.head_width % 2:
            raise UsageError(f"{self}: heads must be a multiple of kv_heads, and head_width even")


def rotary_table(shape: DecoderShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (`shape.slots`, head_width / 2) in float32, of the plain rotary embedding."""
    pairs = torch.arange(0, shape.head_width, 2, device=device, dtype=torch.float32)
    frequencies = shape.rope_theta ** (-pairs / shape.head_width)
    angles = torch.arange(shape.slots, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()
