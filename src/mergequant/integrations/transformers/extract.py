"""A `Decoder` of fused ops out of a loaded model, by the names that a family of models gives to its parts.

Names alone prove nothing; `proof` does.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from mergequant.checkpoint import KV_MODULE, PREFIX_MODULE
from mergequant.errors import UsageError
from mergequant.nn import PrefixStore, QuantNorm
from mergequant.ops.kv_layout import WIDTH_MULTIPLE
from mergequant.runtime import (
    KV_BITS,
    Attention,
    Decoder,
    DecoderLayer,
    DecoderShape,
    FloatNorm,
    KVFormat,
    build_mlp,
    build_norm,
    build_projection,
)

__all__ = ["extract", "require_servable", "with_cache"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of the text
ACTIVATIONS = ("silu", "swish")
PARTS = {  # of a block, and of its two sublayers; anything else with weights inside would be left out
    "": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
LEAST_POSITIONS = 64  # the proof needs some
LARGEST_PREFIX = 8  # tokens, in the attention kernels


def extract(model: Any, kv_bits: int = 16) -> Decoder:
    """The decoder of a loaded model, which shares its tensors; weights move into tiles that both use.

    Args:
        model: `LlamaForCausalLM` and the like, loaded or quantized in memory.
        kv_bits: of cached keys and values.

    Raises:
        UsageError: as `require_servable`.
    """
    require_servable(model)
    config, inner = model.config, model.model
    blocks = list(inner.layers)
    device, dtype = model.device, model.dtype
    first = blocks[0].self_attn
    width = int(first.head_dim)
    shape = DecoderShape(
        layers=len(blocks),
        channels=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=width,
        ffn=config.intermediate_size,
        vocabulary=model.lm_head.weight.shape[0],
        positions=_positions(config),
        eps=config.rms_norm_eps,
        rope_theta=float((config.rope_parameters or {}).get("rope_theta", 0.0)),
        qk_norm=hasattr(first, "q_norm"),
        qkv_bias=first.q_proj.bias is not None,
    )
    kv = _kv_format(inner, shape, kv_bits, device)
    store: PrefixStore | None = getattr(inner, PREFIX_MODULE, None)
    where = torch.arange(shape.slots, device=device)[None]
    with torch.no_grad():
        cos, sin = inner.rotary_emb(torch.zeros(1, 1, 1, device=device, dtype=torch.float32), where)
        layers = [_layer(block, shape, store, number, dtype) for number, block in enumerate(blocks)]
    return Decoder(
        shape=shape,
        embedding=inner.embed_tokens.weight,
        layers=tuple(layers),
        norm=FloatNorm(inner.norm.weight, inner.norm.variance_epsilon),
        head=model.lm_head.weight,
        cos=cos[0, :, : width // 2].float().contiguous(),
        sin=sin[0, :, : width // 2].float().contiguous(),
        kv=kv,
        prefix=store,
    )


def with_cache(decoder: Decoder, model: Any, kv_bits: int) -> Decoder:
    """The same decoder on a cache of other bits.

    Raises:
        UsageError: the checkpoint has no scales for it.
    """
    return replace(decoder, kv=_kv_format(model.model, decoder.shape, kv_bits, decoder.device))


def require_servable(model: Any) -> None:
    """Look at a model without touching it.

    Raises:
        UsageError: the fast loop cannot run it, and why.
    """
    config = model.config
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise UsageError(f"models of type {kind!r} are not run by the fast loop; it knows {', '.join(MODEL_TYPES)}")
    if not hasattr(model, "lm_head") or not hasattr(model, "model"):
        raise UsageError(f"{type(model).__name__} has no language-model head")
    if config.hidden_act not in ACTIVATIONS:
        raise UsageError(f"the activation is {config.hidden_act!r}; the fast loop computes SwiGLU")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise UsageError(f"rotary embedding of type {rope!r} depends on the length of the text, a fixed table cannot")
    if not isinstance(model.lm_head, nn.Linear) or model.lm_head.bias is not None:
        raise UsageError("the head is quantized or has a bias; the fast loop wants a plain one")
    if _positions(config) < LEAST_POSITIONS:
        raise UsageError(f"tokens see {_positions(config)} others at most; the fast loop wants {LEAST_POSITIONS}")
    store = getattr(model.model, PREFIX_MODULE, None)
    if store is not None and len(store.spec.tokens) > LARGEST_PREFIX:
        raise UsageError(f"the stored prefix has {len(store.spec.tokens)} tokens; the kernels take {LARGEST_PREFIX}")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise UsageError(f"the model is spread over {', '.join(sorted(map(str, devices)))}; put it on one device")
    for block in model.model.layers:
        norms = (block.input_layernorm, block.post_attention_layernorm)
        if any(isinstance(norm, QuantNorm) and norm.spec.norm != "rms" for norm in norms):
            raise UsageError("the model has LayerNorms; the fast loop runs RMSNorm")
        for place, known in PARTS.items():
            for name, child in block.get_submodule(place).named_children():
                if name not in known and any(True for _ in (*child.parameters(), *child.buffers())):
                    raise UsageError(f"{type(block).__name__} has a part {name!r} that the fast loop does not know")


def _positions(config: Any) -> int:
    """Slots for which full attention is what the model computes."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        return min(int(window), int(config.max_position_embeddings))
    return int(config.max_position_embeddings)


def _kv_format(inner: nn.Module, shape: DecoderShape, bits: int, device: torch.device) -> KVFormat:
    if bits not in KV_BITS:
        raise UsageError(f"a key/value cache of {bits} bits: choose one of {KV_BITS}")
    if bits == 16:
        ones = torch.ones(shape.layers, shape.kv_heads, shape.head_width, device=device, dtype=torch.float32)
        return KVFormat(16, ones, ones)
    scales = getattr(inner, KV_MODULE, None)
    if scales is None:
        raise UsageError(
            f"this checkpoint has no scales for a key/value cache of {bits} bits; quantize the model again with this "
            "release, which measures them, or keep 16 bits"
        )
    if scales.spec.key_rotation:
        raise UsageError(
            f"model.{KV_MODULE}: a cache of {bits} bits would hold keys that are rotated by {scales.spec.key_rotation} "
            "(rotate_keys of the recipe), and the kernels of the fast loop know plain keys only. Keep 16 bits; or load "
            f"with serve=False and pass generate a QuantizedCache of {bits} bits; or quantize again without rotate_keys"
        )
    if shape.head_width % WIDTH_MULTIPLE:
        raise UsageError(
            f"heads are {shape.head_width} wide; a cache of {bits} bits wants multiples of {WIDTH_MULTIPLE}, keep 16"
        )
    return KVFormat(bits, getattr(scales, f"key_scale_{bits}"), getattr(scales, f"value_scale_{bits}"))


def _layer(block: Any, shape: DecoderShape, store: PrefixStore | None, number: int, dtype: torch.dtype) -> DecoderLayer:
    attention, mlp = block.self_attn, block.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return DecoderLayer(
        attention_norm=build_norm(block.input_layernorm, _eps(block.input_layernorm)),
        attention=Attention(
            qkv=build_projection([attention.q_proj, attention.k_proj, attention.v_proj]),
            output=build_projection([attention.o_proj]),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_width=shape.head_width,
            scale=float(attention.scaling),
            query_norm=None if query_norm is None else query_norm.weight.float(),
            key_norm=None if key_norm is None else key_norm.weight.float(),
            eps=0.0 if query_norm is None else _eps(query_norm),
            prefix_key=None if store is None else store.keys[number].to(dtype),
            prefix_value=None if store is None else store.values[number].to(dtype),
        ),
        mlp_norm=build_norm(block.post_attention_layernorm, _eps(block.post_attention_layernorm)),
        mlp=build_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _eps(norm: nn.Module) -> float:
    return norm.spec.eps if isinstance(norm, QuantNorm) else cast(float, norm.variance_epsilon)
