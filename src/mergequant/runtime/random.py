"""random_decoder: a decoder of any shape with random weights, for measuring speed without a download.

Weights are random bytes, already in tiles, and scales are such that a model of this kind would have them: hidden states
stay finite through all layers, and codes spread over their grid. The scheme is the static one of `mergequant-w4a8`:
norms emit codes, attention's output and SwiGLU's become codes by one multiplier each.
"""

import math

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.ops.tiles import tile_shape
from mergequant.runtime.cache import KVFormat
from mergequant.runtime.decoder import Decoder
from mergequant.runtime.layer import Attention, DecoderLayer, GatedMLP
from mergequant.runtime.parts import (
    Branch,
    FloatNorm,
    FusedGate,
    Projection,
    Quantizer,
    QuantizingNorm,
    TiledLinear,
)
from mergequant.runtime.shape import DecoderShape, rotary_table

__all__ = ["random_decoder"]

BITS = 8  # of activations
NORM_SPREAD = 30.0  # standard deviation of a norm's codes
ATTENTION_SPREAD = 20.0  # of attention's codes, roughly: they depend on how many tokens are averaged
ATTENTION_MULTIPLIER = 200.0
PRODUCT_SPREAD = 45.0  # of SwiGLU's codes
HALF_GATE = 0.36  # root mean square of silu(g) for a normal g
SHARE = 0.3  # what one sublayer adds to the residual, whose standard deviation begins with EMBEDDING
EMBEDDING = 1.0
KV_RANGE = 4.0  # standard deviations that the grid of keys and values covers
UNIFORM = {4: math.sqrt((16**2 - 1) / 12), 8: math.sqrt((256**2 - 1) / 12)}  # deviation of random codes


def random_decoder(
    shape: DecoderShape,
    device: torch.device | str,
    seed: int = 0,
    *,
    weight_bits: int = 4,
    kv_bits: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Decoder:
    """A decoder with random weights, built on the device itself.

    Args:
        shape: its numbers.
        device: where it lives.
        seed: of the weights; the same device type gives the same ones.
        weight_bits: 4 or 8.
        kv_bits: 16, 8 or 4.
        dtype: of hidden states, embedding and head.

    Raises:
        UsageError: bits other than these.
    """
    if weight_bits not in UNIFORM:
        raise UsageError(f"random weights of {weight_bits} bits: choose 4 or 8")
    make = _Maker(shape, torch.device(device), seed, weight_bits, dtype)
    scales = torch.full((shape.layers, shape.kv_heads, shape.head_width), 1.0, dtype=torch.float32, device=device)
    if kv_bits < 16:
        scales *= KV_RANGE / (2 ** (kv_bits - 1) - 1)
    cos, sin = rotary_table(shape, make.device)
    return Decoder(
        shape=shape,
        embedding=make.normal(shape.vocabulary, shape.channels, EMBEDDING),
        layers=tuple(make.layer() for _ in range(shape.layers)),
        norm=FloatNorm(torch.ones(shape.channels, device=device, dtype=dtype), shape.eps),
        head=make.normal(shape.vocabulary, shape.channels, shape.channels**-0.5),
        cos=cos,
        sin=sin,
        kv=KVFormat(kv_bits, scales, scales),
    )


class _Maker:
    def __init__(
        self, shape: DecoderShape, device: torch.device, seed: int, weight_bits: int, dtype: torch.dtype
    ) -> None:
        self.shape, self.device, self.weight_bits, self.dtype = shape, device, weight_bits, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, rows: int, columns: int, deviation: float) -> Tensor:
        values = torch.randn(rows, columns, generator=self.generator, device=self.device, dtype=self.dtype)
        return values.mul_(deviation)

    def layer(self) -> DecoderLayer:
        shape = self.shape
        heads = shape.heads + 2 * shape.kv_heads
        inner = shape.heads * shape.head_width
        qkv = self._linear(heads * shape.head_width, shape.channels, NORM_SPREAD, 1.0, shape.qkv_bias)
        out = self._linear(shape.channels, inner, ATTENTION_SPREAD, SHARE)
        gate_up = self._linear(2 * shape.ffn, shape.channels, NORM_SPREAD, 1.0)
        # Groups of 8 gate rows and 8 up rows take turns; the scales of up hold 1 / step of the product.
        scale = gate_up.weight_scale.view(-1, 2, 8).clone()
        scale[:, 1] *= PRODUCT_SPREAD / HALF_GATE
        down = self._linear(shape.channels, shape.ffn, PRODUCT_SPREAD, SHARE)
        gain = self._ones(shape.head_width) if shape.qk_norm else None
        attention = Attention(
            qkv=Projection((Branch(None, qkv),)),
            output=Projection((Branch(self._unit(ATTENTION_MULTIPLIER), out),)),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_width=shape.head_width,
            scale=shape.head_width**-0.5,
            query_norm=gain,
            key_norm=gain,
            eps=shape.eps,
        )
        gate = FusedGate(None, gate_up.tiles, scale.flatten(), None, self.weight_bits, BITS)
        mlp = GatedMLP(gate, Projection((Branch(self._unit(1.0), down),)))
        return DecoderLayer(self._norm(), attention, self._norm(), mlp)

    def _linear(self, outputs: int, width: int, codes: float, result: float, with_bias: bool = False) -> TiledLinear:
        """Random bytes for tiles; scales that turn codes of one deviation into results of another."""
        tiles = torch.randint(
            0, 256, tile_shape(outputs, width, self.weight_bits),
            generator=self.generator, device=self.device, dtype=torch.uint8,
        )  # fmt: skip
        scale = result / (math.sqrt(width) * UNIFORM[self.weight_bits] * codes)
        bias = self._ones(outputs) * 0.1 if with_bias else None
        return TiledLinear(tiles, self._ones(outputs) * scale, bias, self.weight_bits)

    def _norm(self) -> QuantizingNorm:
        return QuantizingNorm(self._ones(self.shape.channels) * NORM_SPREAD, None, None, self.shape.eps, BITS)

    def _unit(self, multiplier: float) -> Quantizer:
        return Quantizer(BITS, self._ones(1) * multiplier)

    def _ones(self, count: int) -> Tensor:
        return torch.ones(count, device=self.device, dtype=torch.float32)
