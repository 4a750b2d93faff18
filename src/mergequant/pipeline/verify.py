"""Verify: reload what was written and compare it with what was in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mergequant.calibration import Chain
from mergequant.checkpoint import PREFIX_MODULE, Checkpoint
from mergequant.errors import VerifyError
from mergequant.pipeline.blocks import outside_tensors, restore_block

__all__ = ["verify_checkpoint"]

GPU_TOLERANCE = 1e-2  # of the largest value: libraries may sum in another order from call to call


def verify_checkpoint(
    checkpoint: Checkpoint, chain: Chain, expected: Mapping[str, Tensor], kv: Mapping[str, Tensor]
) -> float:
    """Run the verify chunk through the blocks as the checkpoint holds them, one in memory at a time.

    Args:
        checkpoint: the finished folder, validated.
        chain: a fresh chain that holds only the verify chunk, with the prefix's tokens if there is one.
        expected: outputs for that chunk, by name, from the run that made the checkpoint.
        kv: steps of a quantized cache by name, empty without them; no outputs above depend on them.

    Returns:
        Largest difference of an output: 0.0 on a CPU; on a GPU rounding of the float parts is allowed for.

    Raises:
        VerifyError: a layer is not accounted for, a tensor outside the blocks differs, or the logits do.
    """
    shell = chain.shell
    names = set(checkpoint.names())
    for name, tensor in outside_tensors(shell).items():
        if name not in names:
            raise VerifyError(f"{name} is missing from {checkpoint.folder}; nothing of it was written")
        if not torch.equal(checkpoint.get(name).to(tensor.device, tensor.dtype), tensor):
            raise VerifyError(f"{name} in {checkpoint.folder} differs from the model's; the disk may be faulty")
        names.discard(name)
    for name, tensor in kv.items():
        if not torch.equal(checkpoint.get(f"{checkpoint.kv_module}.{name}"), tensor):
            raise VerifyError(f"{name} in {checkpoint.folder} differs from what was measured; the disk may be faulty")
        names.discard(f"{checkpoint.kv_module}.{name}")
    layers = dict(checkpoint.quantization.layers)
    for index, block in enumerate(shell.block_names):
        tensors = checkpoint.tensors(f"{block}.")
        names -= tensors.keys()
        if chain.prefix is not None:
            chain.prefix.keys, chain.prefix.values = _stored_prefix(checkpoint, index, chain.prefix.hidden)
        restore_block(shell, index, layers, tensors)
        chain.advance()
        shell.release_block(index)
    extra = {name for name in names if f"{PREFIX_MODULE}." not in name}
    if extra:
        raise VerifyError(f"{checkpoint.folder} holds tensors that belong to no layer: {sorted(extra)[:3]}")
    worst = 0.0
    for name, found in chain.outputs(0).items():
        difference = float((found - expected[name]).abs().max())
        allowed = 0.0 if shell.device.type == "cpu" else GPU_TOLERANCE * float(expected[name].abs().max())
        if not difference <= allowed:
            raise VerifyError(
                f"{name.replace('_', ' ')} of the reloaded checkpoint differ from those in memory by up to "
                f"{difference:.3g}; do not use it, and report this with the recipe and the model's config"
            )
        worst = max(worst, difference)
    return worst


def _stored_prefix(checkpoint: Checkpoint, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
    module = checkpoint.prefix_module
    keys = checkpoint.get(f"{module}.keys")[index].unsqueeze(0)
    values = checkpoint.get(f"{module}.values")[index].unsqueeze(0)
    return keys.to(like), values.to(like)
