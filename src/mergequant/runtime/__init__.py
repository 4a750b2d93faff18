"""The fast loop: a decoder of fused ops on a key/value cache, captured decode steps, and generation.

Knows tensors and the modules of `mergequant.nn`, and no class of transformers: `mergequant.integrations.transformers`
takes a `Decoder` out of a loaded model and proves it.
"""

from mergequant.runtime.build import build_mlp, build_norm, build_projection
from mergequant.runtime.cache import KV_BITS, KVCache, KVFormat
from mergequant.runtime.decoder import Decoder
from mergequant.runtime.generate import generate, prefill
from mergequant.runtime.graphs import Stepper, Steppers
from mergequant.runtime.layer import Attention, DecoderLayer, GatedMLP
from mergequant.runtime.parts import FloatNorm
from mergequant.runtime.random import random_decoder
from mergequant.runtime.sampling import Sampling
from mergequant.runtime.shape import DecoderShape, rotary_table

__all__ = [
    "KV_BITS",
    "Attention",
    "Decoder",
    "DecoderLayer",
    "DecoderShape",
    "FloatNorm",
    "GatedMLP",
    "KVCache",
    "KVFormat",
    "Sampling",
    "Stepper",
    "Steppers",
    "build_mlp",
    "build_norm",
    "build_projection",
    "generate",
    "prefill",
    "random_decoder",
    "rotary_table",
]
