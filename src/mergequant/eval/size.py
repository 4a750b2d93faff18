"""True size of a model folder: bytes of its tensors, and bits per parameter of the float architecture."""

import copy
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergequant.checkpoint import count_bits
from mergequant.errors import ModelError, WeightsError

__all__ = ["Size", "folder_size", "memory_size"]

_IN_BLOCK = re.compile(r"\.\d+\.")  # a module list inside the name: `model.layers.3.`, `transformer.h.0.`
_MAX_HEADER = 100_000_000  # the limit that the safetensors format itself sets


@dataclass(frozen=True)
class Size:
    """Bytes of a model and of its linear layers, with the parameters of the float architecture they stand for.

    Tied weights count once. Scales, zero points and indices count as bytes, never as parameters. For a checkpoint of
    ours linear means the quantized layers with all their overhead, file headers too (`checkpoint.count_bits`); for
    every other model it means all tensors inside the blocks.
    """

    bytes: int
    parameters: int
    linear_bytes: int
    linear_parameters: int

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per float parameter, everything counted."""
        return 8 * self.bytes / self.parameters

    @property
    def linear_bits_per_parameter(self) -> float | None:
        """Stored bits per float parameter of the linear layers, all overhead counted; None if there is none."""
        return 8 * self.linear_bytes / self.linear_parameters if self.linear_parameters else None


def folder_size(folder: Path, config: PretrainedConfig) -> Size:
    """Size of a model folder from the headers of its safetensors files; no tensor is read.

    Raises `ModelError` for a folder without safetensors, `WeightsError` for a header that cannot be read, and
    `CheckpointError` for a quantized folder that breaks a rule of the format.
    """
    if is_ours(config):
        counted = count_bits(folder)
        return Size(*(int(counted[key]) for key in ("bytes", "parameters", "linear_bytes", "linear_parameters")))
    sizes: dict[str, int] = {}
    for file in _weight_files(folder):
        sizes.update(_tensor_bytes(file))
    return _size(sizes.items(), config)


def is_ours(config: PretrainedConfig) -> bool:
    """Whether a config is that of a checkpoint in this project's format."""
    value = getattr(config, "quantization_config", None)
    method = value.get("quant_method") if isinstance(value, Mapping) else getattr(value, "quant_method", None)
    return method == "mergequant"


def memory_size(model: torch.nn.Module, config: PretrainedConfig) -> Size:
    """Size of a model that lives in memory only: parameters and persistent buffers, shared storage once."""
    seen: dict[int, tuple[str, int]] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            seen.setdefault(tensor.data_ptr() or id(tensor), (name, tensor.nbytes))
    return _size(seen.values(), config)


def _size(sizes: Any, config: PretrainedConfig) -> Size:
    pairs = list(sizes)
    total, inside = _float_parameters(config)
    return Size(sum(n for _, n in pairs), total, sum(n for name, n in pairs if _IN_BLOCK.search(name)), inside)


def _float_parameters(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of the float architecture, in all and inside blocks, from a model without storage."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    model.tie_weights()
    counts = [(name, parameter.numel()) for name, parameter in model.named_parameters()]  # yields tied ones once
    return sum(n for _, n in counts), sum(n for name, n in counts if _IN_BLOCK.search(name))


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = sorted(folder / Path(name).name for name in names)
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"Model folder {str(folder)!r} holds no .safetensors file; convert the model first.")
    yield from files


def _tensor_bytes(file: Path) -> dict[str, int]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        return {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"Weights {str(file)!r}: header cannot be read ({error}); copy the file again.") from error
