"""Small random decoders, in float32 so that results are tight, on the CPU by the torch references of the ops."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mergequant.nn import PrefixSpec, PrefixStore
from mergequant.runtime import Decoder, DecoderShape, random_decoder

SHAPE = DecoderShape(layers=2, channels=64, heads=4, kv_heads=2, head_width=32, ffn=96, vocabulary=61, positions=192)
BOS = 1


@pytest.fixture
def shape() -> DecoderShape:
    return SHAPE


@pytest.fixture
def decoder() -> Callable[..., Decoder]:
    """decoder(kv_bits=..., prefix=number of tokens or 0, **changes of the shape)."""

    def make(kv_bits: int = 16, prefix: int = 0, replaces_bos: bool = True, **changes: Any) -> Decoder:
        shape = replace(SHAPE, **changes)
        made = random_decoder(shape, "cpu", kv_bits=kv_bits, dtype=torch.float32)
        return with_prefix(made, prefix, replaces_bos) if prefix else made

    return make


def with_prefix(decoder: Decoder, tokens: int, replaces_bos: bool) -> Decoder:
    """The decoder with a prefix of random keys and values."""
    shape, generator = decoder.shape, torch.Generator().manual_seed(3)
    spec = PrefixSpec(
        tokens=(BOS, *range(5, 4 + tokens)), replaces_bos=replaces_bos, layers=shape.layers, kv_heads=shape.kv_heads,
        key_width=shape.head_width, value_width=shape.head_width, channels=shape.channels,
    )  # fmt: skip
    store = PrefixStore(spec)
    for name in ("keys", "values", "hidden"):
        setattr(store, name, torch.randn(getattr(store, name).shape, generator=generator) * 2)
    layers = tuple(
        replace(layer, attention=replace(layer.attention, prefix_key=store.keys[i], prefix_value=store.values[i]))
        for i, layer in enumerate(decoder.layers)
    )
    return replace(decoder, layers=layers, prefix=store)
