"""What becomes of a model that vLLM has built: norms that emit codes, a fused gate, a stored first token, a loader.

Works on names and `nn.Module`s, and imports nothing of vLLM.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from mergequant.checkpoint import KV_MODULE, PREFIX_MODULE, Quantization, expected_tensors
from mergequant.errors import CheckpointError
from mergequant.integrations.vllm.placement import Placement
from mergequant.integrations.vllm.served import ServedLinear, ServedNorm
from mergequant.integrations.vllm.shards import Share
from mergequant.integrations.vllm.sink import Sink, SinkAttention, SinkRotary
from mergequant.nn import NormSpec

__all__ = ["SERVED", "install"]

SERVED = "mergequant_served"  # of a linear layer of vLLM's: the `ServedLinear` that does its work
DECODER = "model"  # module of vLLM's causal models that owns the blocks


def install(
    model: nn.Module, quantization: Quantization, share: Share, most_tokens: int
) -> tuple[Placement, Sink | None]:
    """Change a freshly built model, whose linear layers hold `ServedLinear`s, into the one that is described.

    Args:
        model: vLLM's Llama, Mistral, Qwen2 or Qwen3, nothing loaded yet.
        quantization: the checkpoint's description.
        share: which GPU of those that hold the model.
        most_tokens: of one step.

    Returns:
        Where the checkpoint's tensors go, and the stored first token, if there is one.

    Raises:
        CheckpointError: a described layer that the model does not have.
        UsageError: a prefix, norm or layer that cannot be served.
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
    sink = None if quantization.prefix is None else _install_sink(model, quantization, share, most_tokens, placement)
    if quantization.kv is not None:  # steps of this project's own caches, which vLLM's attention does not know
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


def _install_sink(model: nn.Module, quantization: Quantization, share: Share, most: int, placement: Placement) -> Sink:
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
        block.self_attn.attn = SinkAttention(block.self_attn.attn, sink, layer)
    sink.place(placement)
    return sink
