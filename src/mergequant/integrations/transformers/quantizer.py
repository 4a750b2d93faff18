"""MergeQuantQuantizer: teaches `from_pretrained` to build the modules that a checkpoint describes."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from mergequant.checkpoint import KV_MODULE, PREFIX_MODULE, Quantization, open_checkpoint
from mergequant.errors import CheckpointError, UsageError
from mergequant.integrations.transformers.config import MergeQuantConfig
from mergequant.integrations.transformers.prefix import find_decoder, install_prefix
from mergequant.nn import KVScales, PrefixStore, QuantModule, build_module

__all__ = ["MergeQuantQuantizer", "quantize_skeleton"]


class MergeQuantQuantizer(HfQuantizer):
    """Loads checkpoints; it never quantizes on the fly.

    Raises:
        UsageError: the checkpoint holds a float model.
    """

    quantization_config: MergeQuantConfig

    def __init__(self, quantization_config: MergeQuantConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UsageError(
                "the model is not quantized, and a MergeQuantConfig passed to from_pretrained cannot quantize it: make "
                "a checkpoint with `mergequant quantize MODEL --recipe NAME --data DATA --out DIR` and load that"
            )
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        files, dtype = kwargs.get("checkpoint_files"), kwargs.get("dtype")
        prefix_module = kv_module = None
        if files:
            checkpoint = open_checkpoint(Path(files[0]).parent)
            checkpoint.validate()
            prefix_module, kv_module = checkpoint.prefix_module, checkpoint.kv_module
        quantization = self.quantization_config.quantization
        quantize_skeleton(model, quantization, dtype or model.dtype, prefix_module, kv_module)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in list(model.modules()):
            store = module._modules.get(PREFIX_MODULE)
            if isinstance(store, PrefixStore):
                install_prefix(model, store, module)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` gives an equal checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def quantize_skeleton(
    model: nn.Module,
    quantization: Quantization,
    dtype: torch.dtype,
    prefix_module: str | None = None,
    kv_module: str | None = None,
) -> None:
    """Replace the described modules by empty quantized ones, on the meta device, and attach empty prefix and steps.

    Args:
        model: skeleton of the float architecture, with or without its head.
        quantization: what to build, by the full names of the model with its head.
        dtype: of float results.
        prefix_module, kv_module: full names for the prefix and the steps of a quantized cache; None puts them beside
            the blocks.

    Raises:
        CheckpointError: a layer that the model does not have, or that stands for something else.
    """
    with torch.device("meta"):
        for name, spec in quantization.layers.items():
            place = _place(model, name)
            if place is None:
                continue
            parent, child = place
            if not isinstance(parent._modules.get(child), nn.Module):
                raise CheckpointError(
                    f"{name}: the config describes this layer, {type(model).__name__} has none of this name; the rest "
                    "of config.json belongs to another model, or transformers renamed the layer: fetch it again"
                )
            parent._modules[child] = _in_dtype(build_module(spec), dtype)
            parent._is_hf_initialized = True  # type: ignore[assignment]  # some classes would now draw a float weight
        if quantization.prefix is not None:
            decoder = _owner(model, prefix_module, quantization.prefix.layers)
            decoder.add_module(PREFIX_MODULE, _in_dtype(PrefixStore(quantization.prefix), dtype))
        if quantization.kv is not None:
            decoder = _owner(model, kv_module, quantization.kv.layers)
            decoder.add_module(KV_MODULE, _in_dtype(KVScales(quantization.kv), dtype))


def _owner(model: nn.Module, name: str | None, layers: int) -> nn.Module:
    """The module that holds the module of this full name; for None the one that owns `layers` blocks."""
    if name is None:
        return model.get_submodule(find_decoder(model, layers))
    place = _place(model, name)
    if place is None:
        raise CheckpointError(f"{name}: {type(model).__name__} has no module to attach it to")
    return place[0]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Module that holds the layer of this full name, and the layer's name in it; None for a head that is not there."""
    base = getattr(model, "base_model_prefix", "")
    if base and not hasattr(model, base):  # the model without its head: names may start inside
        inside = name.startswith(base + ".")
        if not inside and not hasattr(model, name.partition(".")[0]):
            return None
        name = name.removeprefix(base + ".")
    elif base and not name.startswith(base + ".") and not hasattr(model, name.partition(".")[0]):
        name = f"{base}.{name}"  # saved without a head, opened with one
    parent, _, child = name.rpartition(".")
    try:
        return model.get_submodule(parent), child
    except AttributeError as error:
        raise CheckpointError(
            f"{name}: the config describes this layer, {type(model).__name__} has no module {parent!r}; "
            "fetch the checkpoint again"
        ) from error


def _in_dtype(module: QuantModule, dtype: torch.dtype) -> QuantModule:
    for part in module.modules():
        if isinstance(part, QuantModule):
            part.out_dtype = dtype
    return module.eval()
