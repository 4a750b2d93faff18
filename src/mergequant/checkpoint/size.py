"""How large a checkpoint truly is: bytes on disk, bits per parameter, nothing left out."""

import math
from pathlib import Path
from typing import Any

from mergequant.checkpoint.reader import Checkpoint, open_checkpoint
from mergequant.nn import NormSpec

__all__ = ["count_bits"]


def count_bits(folder: Path | str) -> dict[str, float]:
    """Bytes and bits per parameter of a checkpoint.

    What a quantized layer costs is everything that is stored for it: codes, scales, biases, the multipliers, gather
    indices and offsets of its norm, and its share of the file headers.

    Returns:
        bytes: size of all safetensors files.
        linear_bytes: of which for quantized layers.
        auxiliary_bytes: of which for the prefix and the steps of a quantized cache.
        parameters: of the float architecture, tied weights once (`figures.parameters`; else counted from the tensors).
        linear_parameters: of the quantized linear layers in the float architecture (`figures.linear_parameters`; else
            from the descriptions).
        bits_per_parameter, linear_bits_per_parameter: the quotients.

    Raises:
        CheckpointError: as `open_checkpoint`, or a shard that cannot be read.
    """
    checkpoint = open_checkpoint(folder)
    layers = checkpoint.quantization.layers
    total, linear, auxiliary = 0.0, 0.0, 0.0
    for file in checkpoint.files:
        text = sum(entry.text for entry in file.entries.values())
        for name, entry in file.entries.items():
            size = entry.size + file.overhead * entry.text / text
            total += size
            linear += size if _is_quantized(name, layers) else 0
            auxiliary += size if _is_auxiliary(name, checkpoint) else 0
    linear_parameters = _figure(checkpoint, "linear_parameters") or sum(
        spec.outputs * (spec.input.in_width + spec.bias) for spec in layers.values() if not isinstance(spec, NormSpec)
    )
    parameters = _figure(checkpoint, "parameters") or linear_parameters + _float_parameters(checkpoint)
    return {
        "bytes": round(total),
        "linear_bytes": round(linear),
        "auxiliary_bytes": round(auxiliary),
        "parameters": parameters,
        "linear_parameters": linear_parameters,
        "bits_per_parameter": 8 * total / parameters,
        "linear_bits_per_parameter": 8 * linear / linear_parameters,
    }


def _figure(checkpoint: Checkpoint, name: str) -> int:
    value = checkpoint.quantization.figures.get(name)
    return value if type(value) is int and value > 0 else 0


def _float_parameters(checkpoint: Checkpoint) -> int:
    quantization = checkpoint.quantization
    kept = [
        entry
        for name, entry in checkpoint.entries.items()
        if not _is_quantized(name, quantization.layers) and not _is_auxiliary(name, checkpoint)
    ]
    norms = [spec for spec in quantization.layers.values() if isinstance(spec, NormSpec)]
    gains = sum(spec.channels * (2 if spec.norm == "layer" else 1) for spec in norms)
    return sum(math.prod(entry.shape) for entry in kept) + gains


def _is_auxiliary(name: str, checkpoint: Checkpoint) -> bool:
    return name.startswith((f"{checkpoint.prefix_module}.", f"{checkpoint.kv_module}."))


def _is_quantized(name: str, layers: dict[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))
