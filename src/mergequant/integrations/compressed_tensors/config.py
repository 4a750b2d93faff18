"""`quantization_config` of compressed-tensors for the schemes of a checkpoint's layers."""

from typing import Any

from mergequant.integrations.compressed_tensors.layers import Scheme

__all__ = ["quantization_config"]

QUANT_METHOD = "compressed-tensors"
INTEGERS, PACKED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"


def quantization_config(schemes: dict[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """The config: one group for each scheme, whose targets are the full names of its layers.

    Args:
        schemes: of every quantized linear layer, by its full name.
        ignore: full names of the linear layers that stay in floating point.
    """
    groups: dict[str, Any] = {}
    for number, scheme in enumerate(sorted(set(schemes.values()))):
        groups[f"group_{number}"] = {
            "targets": [name for name, own in schemes.items() if own == scheme],
            "weights": _arguments(
                scheme.weight_bits,
                "group" if scheme.group_size else "channel",
                scheme.group_size,
                symmetric=not scheme.zeros,
            ),
            "input_activations": None
            if scheme.inputs == "float"
            else _arguments(8, scheme.inputs, dynamic=scheme.inputs == "token"),
            "output_activations": None,
            "format": PACKED if scheme.inputs == "float" else INTEGERS,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _arguments(
    bits: int, strategy: str, group_size: int = 0, *, dynamic: bool = False, symmetric: bool = True
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size or None,
        "dynamic": dynamic,
    }
