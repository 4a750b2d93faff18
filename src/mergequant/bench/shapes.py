"""Shapes that can be measured by name, and the arithmetic of what they hold.

Random weights of a shape run as fast as trained ones, so nothing is downloaded. A folder with a `config.json` of the
same family of architectures works as well.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergequant.errors import ModelError, UsageError
from mergequant.runtime import DecoderShape
from mergequant.steps import near_name

__all__ = [
    "SHAPES",
    "cache_bytes",
    "folder_shape",
    "head_parameters",
    "layer_linears",
    "linear_parameters",
    "named_shape",
    "parameters",
]

LAYERS_OF_70B = 4  # of 80: enough for layers to follow one another, and the bf16 weights take 7 GB instead of 137

SHAPES = {
    "llama-2-7b": DecoderShape(
        layers=32,
        channels=4096,
        heads=32,
        kv_heads=32,
        head_width=128,
        ffn=11008,
        vocabulary=32000,
        eps=1e-5,
        rope_theta=1e4,
        positions=4096,
    ),
    "llama-3-8b": DecoderShape(
        layers=32,
        channels=4096,
        heads=32,
        kv_heads=8,
        head_width=128,
        ffn=14336,
        vocabulary=128256,
        eps=1e-5,
        rope_theta=5e5,
        positions=8192,
    ),
    "qwen3-8b": DecoderShape(
        layers=36,
        channels=4096,
        heads=32,
        kv_heads=8,
        head_width=128,
        ffn=12288,
        vocabulary=151936,
        eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
        positions=40960,
    ),
    "llama-2-70b-layer": DecoderShape(
        layers=LAYERS_OF_70B,
        channels=8192,
        heads=64,
        kv_heads=8,
        head_width=128,
        ffn=28672,
        vocabulary=32000,
        eps=1e-5,
        rope_theta=1e4,
        positions=4096,
    ),
}
# Architectures that are the decoder which is measured: RMSNorm, rotary positions, SwiGLU.
QK_NORM = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}


def named_shape(name: str, layers: int | None = None) -> DecoderShape:
    """A shape of `SHAPES`; `layers` replaces its number of layers.

    Raises:
        UsageError: an unknown name, with near ones.
    """
    if name not in SHAPES:
        raise UsageError(
            f"{name!r} is neither a folder nor a shape{near_name(name, SHAPES)}; shapes are {', '.join(SHAPES)}"
        )
    return SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)


def folder_shape(folder: Path, layers: int | None = None) -> DecoderShape:
    """The shape that a model folder's `config.json` describes.

    Raises:
        ModelError: no readable config, or an architecture that is not such a decoder.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}); pass a model folder or one of {', '.join(SHAPES)}"
        ) from error
    kind = config.get("model_type")
    if kind not in QK_NORM:
        raise ModelError(f"{path}: model_type {kind!r} cannot be measured; {', '.join(QK_NORM)} can")
    try:
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or {}
        return DecoderShape(
            layers=config["num_hidden_layers"] if layers is None else layers,
            channels=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
            qk_norm=QK_NORM[kind],
            qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
            positions=config.get("max_position_embeddings", 4096),
        )
    except KeyError as error:
        raise ModelError(f"{path} has no {error}, which the shape of a {kind} model needs") from error


def layer_linears(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """(outputs, width) of a layer's four products: q/k/v in one, gate and up in one."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    return {
        "qkv": (queries + 2 * keys, shape.channels),
        "o": (shape.channels, queries),
        "gate_up": (2 * shape.ffn, shape.channels),
        "down": (shape.channels, shape.ffn),
    }


def linear_parameters(shape: DecoderShape) -> int:
    """Parameters of all layers' products: what is quantized."""
    return shape.layers * sum(outputs * width for outputs, width in layer_linears(shape).values())


def head_parameters(shape: DecoderShape) -> int:
    """Parameters of the LM head; the embedding has as many."""
    return shape.vocabulary * shape.channels


def parameters(shape: DecoderShape) -> int:
    """Linear layers, embedding, head and norms (biases and norms of heads, some thousands, left out)."""
    norms = (2 * shape.layers + 1) * shape.channels
    return linear_parameters(shape) + 2 * head_parameters(shape) + norms


def cache_bytes(shape: DecoderShape, batch: int, tokens: int, bits: int) -> int:
    """Bytes of keys and values of `tokens` positions in `batch` sequences at `bits` per element."""
    return 2 * shape.layers * batch * shape.kv_heads * tokens * shape.head_width * bits // 8
