"""Tiny models quantized by hand (plain rounding, static steps from a few random tokens), in memory and on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from mergequant import ops
from mergequant.checkpoint import KV_MODULE, PREFIX_MODULE, CheckpointWriter, Quantization
from mergequant.grids import pack_codes
from mergequant.integrations.transformers import install_prefix, register
from mergequant.nn import (
    InputSpec,
    KVScales,
    KVSpec,
    LinearSpec,
    NormSpec,
    PrefixSpec,
    PrefixStore,
    QuantLinear,
    QuantNorm,
)
from mergequant.transforms import kv_steps

BOS = 1
VOCABULARY = 61


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def _llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(changes.pop("seed", 0))
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "bos_token_id": BOS,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def _opt(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(changes.pop("seed", 0))
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "init_std": 0.3,
        "bos_token_id": BOS,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "word_embed_proj_dim": 32,
        "activation_function": "relu",
    }
    return OPTForCausalLM(OPTConfig(**{**settings, **changes})).eval()


BUILDERS = {
    "llama": _llama,
    "llama_tied": lambda **changes: _llama(tie_word_embeddings=True, **changes),
    "opt": _opt,
}
# Per block: norm and what it feeds, inputs quantized one token at a time, inputs quantized with a fixed step.
ROLES = {
    "llama": (
        (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
         ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))),
        ("self_attn.o_proj",),
        ("mlp.down_proj",),
    ),
    "opt": (
        (("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
         ("final_layer_norm", ("fc1",))),
        ("self_attn.out_proj",),
        ("fc2",),
    ),
}  # fmt: skip


def _set(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def _rtn(spec: LinearSpec, weight: Tensor, bias: Tensor | None) -> QuantLinear:
    layer = QuantLinear(spec)
    high = 2 ** (spec.weight_bits - 1) - 1
    layer.weight_scale = weight.abs().amax(1) / high
    layer.weight_codes = pack_codes((weight / layer.weight_scale[:, None]).round(), spec.weight_bits)
    layer.bias = None if bias is None else bias.clone()
    return layer


def _norm_site(block: nn.Module, name: str, consumers: tuple[str, ...], step: Tensor) -> None:
    norm = block.get_submodule(name)
    gain, bias = norm.weight, getattr(norm, "bias", None)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    channels = gain.shape[0]
    # The first two channels appear twice, each with half its weight: a gather index that means something.
    index = torch.cat([torch.arange(channels), torch.arange(2)])
    share = torch.ones(channels + 2)
    share[[0, 1, channels, channels + 1]] = 0.5
    spec = NormSpec(
        norm="rms" if bias is None else "layer", channels=channels, width=channels + 2, bits=8, eps=eps,
        gathers=True, shifts=bias is not None,
    )  # fmt: skip
    quantized = QuantNorm(spec)
    quantized.multiplier = (gain / step)[index].float()
    quantized.index = index.int()
    if bias is not None:
        quantized.shift = (bias / step)[index].float()
    for consumer in consumers:
        linear = block.get_submodule(consumer)
        source = InputSpec(kind="codes", in_width=channels, width=channels + 2)
        weight = (linear.weight * step)[:, index] * share
        built = LinearSpec(outputs=linear.out_features, input=source, bias=linear.bias is not None)
        _set(block, consumer, _rtn(built, weight, linear.bias))
    _set(block, name, quantized)


@torch.no_grad()
def _quantize(model: PreTrainedModel, family: str) -> dict[str, dict[str, Any]]:
    """Replace modules in place; returns descriptions by full name."""
    sites, dynamic, static = ROLES[family.split("_", maxsplit=1)[0]]
    blocks_name = "model.decoder.layers" if family == "opt" else "model.layers"
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2).abs().amax(0))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(5)))
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(model.get_submodule(blocks_name)):
        for norm, consumers in sites:
            absmax = inputs[f"{blocks_name}.{number}.{consumers[0]}"].clamp_min(1e-3)
            _norm_site(block, norm, consumers, absmax / 127)
        for name in (*dynamic, *static):
            linear = block.get_submodule(name)
            width = linear.in_features
            rotation = ops.rotation(width)
            kind = "dynamic" if name in dynamic else "static"
            source = InputSpec(kind=kind, in_width=width, width=width, rotation=rotation.name)
            weight = linear.weight @ rotation.matrix().float()
            if kind == "static":
                step = inputs[f"{blocks_name}.{number}.{name}"].max() * 2 / 127
                weight = weight * step
            built = LinearSpec(outputs=linear.out_features, input=source, bias=linear.bias is not None)
            quantized = _rtn(built, weight, linear.bias)
            if kind == "static":
                quantized.input_quantizer.multiplier = 1 / step.reshape(1)
            _set(block, name, quantized)
    return {
        name: module.spec.to_dict()
        for name, module in model.named_modules()
        if isinstance(module, QuantNorm | QuantLinear)
    }


@torch.no_grad()
def _store(model: PreTrainedModel, tokens: tuple[int, ...], replaces_bos: bool, dtype: torch.dtype) -> PrefixStore:
    out = model.base_model(torch.tensor([tokens]), use_cache=True)
    layers = out.past_key_values.layers
    spec = PrefixSpec(
        tokens=tokens, replaces_bos=replaces_bos, layers=len(layers), kv_heads=layers[0].keys.shape[1],
        key_width=layers[0].keys.shape[-1], value_width=layers[0].values.shape[-1],
        channels=out.last_hidden_state.shape[-1],
    )  # fmt: skip
    store = PrefixStore(spec)
    store.keys = torch.cat([layer.keys for layer in layers]).to(dtype)
    store.values = torch.cat([layer.values for layer in layers]).to(dtype)
    store.hidden = out.last_hidden_state[0].to(dtype)
    return store


@torch.no_grad()
def _steps(model: PreTrainedModel) -> KVScales:
    """Steps of a quantized cache, from random tokens."""
    ids = torch.randint(3, VOCABULARY, (6, 40), generator=torch.Generator().manual_seed(6))
    ids[:, 0] = BOS
    layers = model.base_model(ids, use_cache=True).past_key_values.layers
    heads, widths = layers[0].keys.shape[1], (layers[0].keys.shape[3], layers[0].values.shape[3])
    scales = KVScales(KVSpec(len(layers), heads, *widths))
    for number, layer in enumerate(layers):
        for part, states in (("key", layer.keys), ("value", layer.values)):
            for bits in (8, 4):
                own = kv_steps(states.transpose(1, 2).flatten(0, 1), bits)
                getattr(scales, f"{part}_scale_{bits}")[number] = own
    return scales


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """build(family, **config): a float model."""
    return lambda family="llama", **changes: BUILDERS[family](**changes)


@pytest.fixture
def store_of() -> Callable[..., PrefixStore]:
    """store_of(model, tokens, replaces_bos): the prefix that a float model gives."""

    def make(model: PreTrainedModel, tokens: tuple[int, ...] = (BOS,), replaces_bos: bool = True) -> PrefixStore:
        return _store(model, tokens, replaces_bos, model.dtype)

    return make


@pytest.fixture
def quantized() -> Callable[..., tuple[PreTrainedModel, Quantization]]:
    """quantized(family, prefix=tokens or None, replaces_bos, kv): an integer model in memory, and its description."""

    def make(
        family: str = "llama",
        prefix: tuple[int, ...] | None = None,
        replaces_bos: bool = True,
        kv: bool = False,
        **changes: Any,
    ) -> tuple[PreTrainedModel, Quantization]:
        model = BUILDERS[family](**changes)
        store = None if prefix is None else _store(model, prefix, replaces_bos, torch.float32)
        layers = _quantize(model, family)
        if store is not None:
            install_prefix(model, store)
        scales = _steps(model) if kv else None
        if scales is not None:
            model.get_submodule("model.decoder" if family == "opt" else "model").add_module(KV_MODULE, scales)
        data = {
            "quant_method": "mergequant",
            "format_version": "1.1",
            "recipe": {"name": "by-hand", "steps": [{"round": {"bits": 4}}]},
            "layers": layers,
            "provenance": {"seed": 0},
            "figures": {"loss": 0.5},
            **({} if store is None else {"prefix": store.spec.to_dict()}),
            **({} if scales is None else {"kv": scales.spec.to_dict()}),
        }
        return model, Quantization.from_dict(data)

    return make


@pytest.fixture
def saved(quantized: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """saved(family, ...): the model in memory, and the checkpoint folder that the writer made of it."""

    def make(family: str = "llama", **options: Any) -> tuple[PreTrainedModel, Path]:
        model, quantization = quantized(family, **options)
        out = tmp_path / f"{family}-checkpoint"
        state = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        blocks = [{n: t for n, t in state.items() if f".layers.{i}." in n} for i in range(2)]
        inside = {name for block in blocks for name in block}
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        with CheckpointWriter(out, "fingerprint") as writer:
            for number, block in enumerate(blocks):
                layers = {n: s.to_dict() for n, s in quantization.layers.items() if f".layers.{number}." in n}
                writer.write_block(number, block, {"layers": layers, "figures": {}})
            writer.finish(
                tail={name: tensor for name, tensor in state.items() if name not in inside},
                config={**config, "quantization_config": quantization.to_dict()},
                files={"generation_config.json": model.generation_config.to_json_string()},
            )
        assert any(PREFIX_MODULE in name for name in state) == (quantization.prefix is not None)
        return model, out

    return make
