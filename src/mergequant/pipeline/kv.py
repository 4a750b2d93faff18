"""Steps of a quantized cache: measured on every quantized block, kept in its record, stored beside the prefix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergequant import ops
from mergequant.calibration import BlockContext, record_kv
from mergequant.calibration.chain import Role
from mergequant.checkpoint import KV_MODULE
from mergequant.models import ModelShell
from mergequant.nn import KVSpec
from mergequant.nn.kv_scales import KV_BITS
from mergequant.transforms import kv_error, kv_steps

__all__ = ["KVRecord", "beside_blocks", "describe_kv", "measure_kv", "stack_kv"]

KVRecord = Mapping[str, Any]
"""Steps of one block by the names of `KVScales`' buffers, each (kv_heads, width), as JSON keeps them exactly; and, if
they are those of rotated keys, the rotation's name."""

ROTATION = "key_rotation"
CALIBRATION_TOKENS, HELD_OUT_TOKENS = 8192, 2048
FIGURES = "kv_cache"  # where a block's errors are reported, beside those of its sites


def measure_kv(context: BlockContext) -> KVRecord | None:
    """Steps for the keys and values of a block whose steps are all done.

    It has to be done: a static step of o_proj is divided out of the value projection's rows. Errors on held-out windows
    are reported.

    Returns:
        None for a block that keeps no keys and values; one that lets tokens see later ones can keep none.
    """
    if not context.structure.causal:
        return None
    seen = _kept(context, "calibration", CALIBRATION_TOKENS)
    if seen is None:
        return None
    held_out = _kept(context, "held_out", HELD_OUT_TOKENS)
    record: dict[str, Any] = {ROTATION: ops.rotation(seen[0].shape[2]).name} if context.rotates_keys else {}
    for place, part in enumerate(("key", "value")):
        for bits in KV_BITS:
            steps = kv_steps(seen[place], bits)
            record[f"{part}_scale_{bits}"] = steps.tolist()
            if held_out is not None:
                context.report(FIGURES, **{f"{part}_error_{bits}": kv_error(held_out[place], steps, bits)})
    return record


def stack_kv(records: Sequence[KVRecord | None]) -> tuple[KVSpec | None, dict[str, Tensor]]:
    """Description and buffers of `KVScales` for all blocks; (None, {}) if a block has none, or of another shape."""
    made = [record for record in records if record is not None]
    if not made or len(made) < len(records):
        return None, {}
    rotations = {record.get(ROTATION, "") for record in made}
    blocks = [
        {name: torch.tensor(steps, dtype=torch.float32) for name, steps in record.items() if name != ROTATION}
        for record in made
    ]
    if len(rotations) > 1 or any(block[name].shape != blocks[0][name].shape for block in blocks for name in block):
        return None, {}
    buffers = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    layers, heads, width = buffers["key_scale_8"].shape
    return KVSpec(layers, heads, width, buffers["value_scale_8"].shape[2], *rotations), buffers


def describe_kv(records: Sequence[KVRecord | None], names: Sequence[str]) -> str:
    """In words, what is stored for a quantized cache, or why nothing is."""
    missing = [name for name, record in zip(names, records) if record is None]
    if missing:
        return f"none: {missing[0]} keeps no keys and values of its own in a cache"
    spec = stack_kv(records)[0]
    if spec is None:
        return "none: the blocks' keys and values differ in heads or widths"
    rotated = f", keys rotated by {spec.key_rotation}" if spec.key_rotation else ""
    return f"static steps per channel for {' and '.join(map(str, KV_BITS))} bits{rotated}"


def beside_blocks(shell: ModelShell, module: str = KV_MODULE) -> str:
    """Full name of a module in the decoder that owns the blocks."""
    owner = shell.block_names[0].rpartition(".")[0].rpartition(".")[0]
    return f"{owner}.{module}" if owner else module


def _kept(context: BlockContext, role: Role, tokens: int) -> tuple[Tensor, Tensor] | None:
    """As `record_kv`, keys as a quantized cache rounds them."""
    seen = record_kv(context.chain, role, tokens)
    if seen is None or not context.rotates_keys:
        return seen
    return ops.hadamard_transform(seen[0]), seen[1]
