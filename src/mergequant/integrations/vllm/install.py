"""What becomes of a model that vLLM has built: norms that emit codes, a fused gate, a stored first token, a loader, and
attention on this project's own caches where that is asked for.

Works on names and `nn.Module`s, and imports nothing of vLLM.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from mergequant.checkpoint import KV_MODULE, PREFIX_MODULE, Quantization, expected_tensors
from mergequant.errors import CheckpointError
from mergequant.integrations.vllm.pages import CacheSteps, LayerPages, require_servable
from mergequant.integrations.vllm.placement import Placement
from mergequant.integrations.vllm.served import ServedLinear, ServedNorm
from mergequant.integrations.vllm.shards import Share
from mergequant.integrations.vllm.sink import Sink, SinkAttention, SinkRotary
from mergequant.nn import NormSpec

__all__ = ["SERVED", "OwnCache", "install"]

SERVED = "mergequant_served"  # of a linear layer of vLLM's: the `ServedLinear` that does its work
DECODER = "model"  # module of vLLM's causal models that owns the blocks


@dataclass(frozen=True)
class OwnCache:
    """Caches of this project's, in place of vLLM's.

    Attributes:
        bits: 8 or 4.
        dtype: of the model's keys and values before they are quantized.
        longest: most tokens of a sequence.
        attention: makes the attention module of a layer from vLLM's and what it holds for its pages.
    """

    bits: int
    dtype: torch.dtype
    longest: int
    attention: Callable[[nn.Module, LayerPages], nn.Module]


def install(
    model: nn.Module, quantization: Quantization, share: Share, most_tokens: int, cache: OwnCache | None = None
) -> tuple[Placement, Sink | None]:
    """Change a freshly built model, whose linear layers hold `ServedLinear`s, into the one that is described.

    Args:
        model: vLLM's Llama, Mistral, Qwen2 or Qwen3, nothing loaded yet.
        quantization: the checkpoint's description.
        share: which GPU of those that hold the model.
        most_tokens: of one step.
        cache: None for vLLM's own.

    Returns:
        Where the checkpoint's tensors go, and the stored first token, if there is one.

    Raises:
        CheckpointError: a described layer that the model does not have.
        UsageError: a prefix, norm, layer or cache that cannot be served.
    """
    placement = Placement()
    known: set[str] = set()
    for linear in _served(model):
        linear.place(placement)
        known |= set(linear.layers)
    for name, spec in quantization.layers.items():
        if isinstance(spec, NormSpec):
            norm = ServedNorm(name, spec)
            _replace(model, name, norm)
            norm.place(placement)
            known.add(name)
    if lost := sorted(set(quantization.layers) - known):
        raise CheckpointError(
            f"{lost[0]}: the config describes this layer, vLLM's {type(model).__name__} has none of this name; the "
            "rest of config.json belongs to another model: fetch the checkpoint again"
        )
    for module in list(model.modules()):
        _fuse_gate(module)
    sink = None
    if quantization.prefix is not None:
        sink = _install_sink(model, quantization, share, most_tokens, placement, puts_values=cache is None)
    if cache is not None:
        _install_cache(model, quantization, share, cache, sink, placement)
    elif quantization.kv is not None:  # steps of this project's own caches, which vLLM's attention does not know
        for name in expected_tensors(f"{DECODER}.{KV_MODULE}", quantization.kv):
            placement.add(name, None)
    return placement, sink


def _served(model: nn.Module) -> Iterator[ServedLinear]:
    for module in model.modules():
        if isinstance(module, ServedLinear):
            yield module


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        owner.get_submodule(child)
    except AttributeError as error:
        raise CheckpointError(
            f"{name}: the config describes this norm, vLLM's {type(model).__name__} has none of this name; fetch the "
            "checkpoint again"
        ) from error
    setattr(owner, child, new)


def _fuse_gate(mlp: nn.Module) -> None:
    """Let what stands between gate/up and down make the codes of down's input."""
    children = dict(mlp.named_children())
    pair = [getattr(children.get(name), SERVED, None) for name in ("gate_up_proj", "down_proj")]
    if "act_fn" not in children or not all(isinstance(part, ServedLinear) for part in pair):
        return
    gate_up, down = cast(list[ServedLinear], pair)
    gate_up.feed(down)
    mlp.act_fn = nn.Identity()


def _install_sink(
    model: nn.Module, quantization: Quantization, share: Share, most: int, placement: Placement, *, puts_values: bool
) -> Sink:
    spec = quantization.prefix
    assert spec is not None  # the caller has looked
    decoder = cast(Any, model.get_submodule(DECODER))
    blocks = list(decoder.layers)
    if len(blocks) != spec.layers:
        raise CheckpointError(f"the prefix is made for {spec.layers} blocks, the model has {len(blocks)}")
    sink = Sink(f"{DECODER}.{PREFIX_MODULE}", spec, blocks[0].self_attn.num_kv_heads, share, most)
    decoder.add_module(PREFIX_MODULE, sink)
    for layer, block in enumerate(blocks):
        block.self_attn.rotary_emb = SinkRotary(block.self_attn.rotary_emb, sink, layer)
        if puts_values:  # else storing does it
            block.self_attn.attn = SinkAttention(block.self_attn.attn, sink, layer)
    sink.place(placement)
    return sink


def _install_cache(
    model: nn.Module, quantization: Quantization, share: Share, cache: OwnCache, sink: Sink | None, placement: Placement
) -> None:
    decoder = cast(Any, model.get_submodule(DECODER))
    layers = [block.self_attn for block in decoder.layers]
    kv_heads = layers[0].num_kv_heads
    spec = require_servable(quantization.kv, layers[0].num_heads, kv_heads, layers[0].head_dim)
    if len(layers) != spec.layers:
        raise CheckpointError(f"the cache's steps are made for {spec.layers} blocks, the model has {len(layers)}")
    name = f"{DECODER}.{KV_MODULE}"
    steps = CacheSteps(name, spec, cache.bits, kv_heads, share, cache.dtype, cache.longest)
    decoder.add_module(KV_MODULE, steps)
    for number, layer in enumerate(layers):
        layer.attn = cache.attention(layer.attn, LayerPages(steps, number, sink))
    steps.place(placement)
