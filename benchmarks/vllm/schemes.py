"""What is compared inside vLLM: model shapes, schemes, and the folders that make vLLM build them. Imports no vLLM.

Rivals are folders with nothing but a config; `probes` fills their parameters. Ours are whole checkpoints with random
codes, so that the plugin's own loading is part of the run. Codes have mean zero and the spread of trained ones: zeros
and constants multiply faster, and a mean lets a deep random model collapse.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergequant import ops
from mergequant.checkpoint import KV_MODULE, Quantization, open_checkpoint
from mergequant.checkpoint.tensorfile import write_tensors
from mergequant.grids import pack_codes
from mergequant.nn import InputSpec, KVScales, KVSpec, LinearSpec, NormSpec

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-2-70b-layer": {  # eight layers of the 70B model: what tensor parallelism scales
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPREAD = 0.02  # standard deviation of a weight
CODE_SPREAD = {4: 2.6, 8: 60.0}  # of codes, in steps
EXTRA = 0.05  # share of slots that split channels add, as in the default recipe
TILE = 64
KV_RANGE = 4.0  # of keys and values: about three standard deviations behind such weights


@dataclass(frozen=True)
class Rival:
    """A scheme of vLLM's own.

    Attributes:
        quantization: its `quantization_config`, None for bf16.
        arguments: further arguments of the engine.
        kernel: part of the name of the kernel class that must be found serving.
    """

    quantization: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    kernel: str = ""


@dataclass(frozen=True)
class Ours:
    """A scheme of ours: bits of norm outputs, how inputs of o_proj and down_proj are quantized, bits of the cache."""

    bits: int
    other: str = "static"  # rotated, one step for the tensor; or "dynamic": a scale per token
    kv: int = 16  # vLLM's own cache; or 8 or 4
    kernel: str = "mergequant"

    @property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of the engine."""
        return {"additional_config": {"kv_bits": self.kv}} if self.kv < 16 else {}


def _side(bits: int, kind: str, strategy: str, *, dynamic: bool = False, group: int | None = None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "group_size": group,
        "symmetric": True,
        "dynamic": dynamic,
    }


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


FP8_TOKEN = _side(8, "float", "token", dynamic=True)
INT8_TOKEN = _side(8, "int", "token", dynamic=True)
INT4_GROUPS = _side(4, "int", "group", group=128)
PACKED = "pack-quantized"
SCHEMES: dict[str, Rival | Ours] = {
    "bf16": Rival(),
    "fp8": Rival(_compressed("float-quantized", _side(8, "float", "channel"), FP8_TOKEN), kernel="FP8"),
    "fp8-static": Rival(
        _compressed("float-quantized", _side(8, "float", "tensor"), _side(8, "float", "tensor")), kernel="FP8"
    ),
    "int8": Rival(_compressed("int-quantized", _side(8, "int", "channel"), INT8_TOKEN), kernel="Int8"),
    "w4a16-machete": Rival(_compressed(PACKED, INT4_GROUPS, None), kernel="Machete"),
    "w4a16-marlin": Rival(_compressed(PACKED, INT4_GROUPS, None), {"linear_backend": "marlin"}, "Marlin"),
    "w4a8-fp8": Rival(_compressed(PACKED, INT4_GROUPS, FP8_TOKEN), kernel="W4A8"),
    "w4a8-humming": Rival(
        _compressed(PACKED, _side(4, "int", "channel"), INT8_TOKEN), {"linear_backend": "humming"}, "Humming"
    ),
    "ours-w4a8": Ours(8),
    "ours-w4a8-dynamic": Ours(8, "dynamic"),
    "ours-w4a4": Ours(4),
    "ours-w4a4-dynamic": Ours(4, "dynamic"),
    "ours-w4a4-kv8": Ours(4, kv=8),
    "ours-w4a4-kv4": Ours(4, kv=4),
}


def model_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a float model of that shape; `layers` replaces their number."""
    own = dict(SHAPES[shape])
    own["head_dim"] = own["hidden_size"] // own["num_attention_heads"]
    if layers is not None:
        own["num_hidden_layers"] = layers
    return {**COMMON, **own}


def write_folder(shape: str, scheme: str, root: Path, layers: int | None = None, device: str = "cpu") -> Path:
    """The folder of a scheme under `root`, made if it is not there.

    Args:
        device: what draws the random codes of ours.
    """
    folder = root / f"{shape}-{layers or SHAPES[shape]['num_hidden_layers']}-{scheme}"
    config, kind = model_config(shape, layers), SCHEMES[scheme]
    if (folder / "config.json").is_file() and (not isinstance(kind, Ours) or _whole(folder)):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(kind, Ours):
        quantization = describe(config, kind)
        for number, tensors in enumerate(_tensors(config, quantization, device)):
            write_tensors(folder / f"part-{number}", tensors)
        _name_shards(folder)
        config["quantization_config"] = quantization.to_dict()
    elif kind.quantization is not None:
        config["quantization_config"] = kind.quantization
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if isinstance(kind, Ours):
        open_checkpoint(folder).validate()
    return folder


def _whole(folder: Path) -> bool:
    """Whether no shard of a checkpoint was deleted, as one may to make room between runs."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    return all((folder / name).is_file() for name in set(json.loads(index.read_text())["weight_map"].values()))


def describe(config: dict[str, Any], kind: Ours) -> Quantization:
    """Our description of every layer, as the default recipe leaves it, but for the prefix."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    width = hidden + int(hidden * EXTRA) // TILE * TILE
    codes = InputSpec(kind="codes", in_width=hidden, width=width, bits=kind.bits)

    def other(channels: int) -> InputSpec:
        if kind.other == "dynamic":
            return InputSpec(kind="dynamic", in_width=channels, width=channels, bits=kind.bits)
        rotation = ops.rotation(channels).name
        return InputSpec(kind="static", in_width=channels, width=channels, bits=kind.bits, rotation=rotation)

    norm = NormSpec("rms", hidden, width, kind.bits, config["rms_norm_eps"], gathers=width != hidden)
    block: dict[str, LinearSpec | NormSpec] = {
        "input_layernorm": norm,
        "self_attn.q_proj": LinearSpec(queries, codes),
        "self_attn.k_proj": LinearSpec(keys, codes),
        "self_attn.v_proj": LinearSpec(keys, codes),
        "self_attn.o_proj": LinearSpec(hidden, other(queries)),
        "post_attention_layernorm": norm,
        "mlp.gate_proj": LinearSpec(ffn, codes),
        "mlp.up_proj": LinearSpec(ffn, codes),
        "mlp.down_proj": LinearSpec(hidden, other(ffn)),
    }
    layers = {
        f"model.layers.{number}.{name}": spec
        for number in range(config["num_hidden_layers"])
        for name, spec in block.items()
    }
    heads = config["num_key_value_heads"]
    kv = KVSpec(config["num_hidden_layers"], heads, head, head) if kind.kv < 16 else None
    return Quantization({"name": "random", "steps": []}, layers, {}, {}, kv=kv)


def random_codes(shape: tuple[int, ...], bits: int, generator: torch.Generator) -> Tensor:
    """Bell-shaped integers of mean zero, clipped alike on both sides."""
    high = (1 << (bits - 1)) - 1
    drawn = torch.randn(shape, device=generator.device, generator=generator) * CODE_SPREAD[bits]
    return drawn.round_().clamp_(-high, high).to(torch.int8)


def _tensors(config: dict[str, Any], quantization: Quantization, device: str) -> Any:
    """Tensors of one block after the other, then of what is outside."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, spec in quantization.layers.items():
        own = _norm(spec, generator) if isinstance(spec, NormSpec) else _linear(spec, generator)
        block = ".".join(name.split(".")[:3])
        if block not in blocks and blocks:
            yield blocks.popitem()[1]
        blocks.setdefault(block, {}).update({f"{name}.{key}": value.cpu() for key, value in own.items()})
    yield blocks.popitem()[1]
    if quantization.kv is not None:
        steps = KVScales(quantization.kv).state_dict()
        limits = {name: (1 << (int(name[-1]) - 1)) - 1 for name in steps}
        yield {f"model.{KV_MODULE}.{name}": step * (KV_RANGE / limits[name]) for name, step in steps.items()}
    big = torch.randn(2, vocabulary, hidden, device=device, generator=generator).mul_(SPREAD).to(torch.bfloat16).cpu()
    yield {
        "model.embed_tokens.weight": big[0],
        "lm_head.weight": big[1].clone(),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def _norm(spec: NormSpec, generator: torch.Generator) -> dict[str, Tensor]:
    step = 3 / ((1 << (spec.bits - 1)) - 1)  # three standard deviations of a normed channel fill the grid
    out = {"multiplier": torch.full((spec.width,), 1 / step)}
    if spec.gathers:
        copies = torch.randperm(spec.channels, device=generator.device, generator=generator)
        extra = copies[: spec.width - spec.channels].cpu()
        out["index"] = torch.sort(torch.cat((torch.arange(spec.channels), extra)))[0].to(torch.int32)
    return out


def _linear(spec: LinearSpec, generator: torch.Generator) -> dict[str, Tensor]:
    step = 3 / ((1 << (spec.input.bits - 1)) - 1)
    weight = random_codes((spec.outputs, spec.input.width), 4, generator)
    vary = 0.5 + torch.rand(spec.outputs, device=generator.device, generator=generator)
    scale = vary * (SPREAD / CODE_SPREAD[4]) * (1.0 if spec.input.kind == "dynamic" else step)
    out = {"weight_codes": pack_codes(weight, 4), "weight_scale": scale.float()}
    if spec.input.kind == "static":
        out["input_quantizer.multiplier"] = torch.full((1,), 1 / step)
    return out


def _name_shards(folder: Path) -> None:
    parts = sorted(folder.glob("part-*"), key=lambda path: int(path.name[5:]))
    names = [f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    places: dict[str, str] = {}
    for part, name in zip(parts, names):
        part.rename(folder / name)
        with (folder / name).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        places.update(dict.fromkeys((key for key in header if key != "__metadata__"), name))
    total = sum((folder / name).stat().st_size for name in names)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
