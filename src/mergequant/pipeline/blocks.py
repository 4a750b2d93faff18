"""One block: quantize it by the steps of a recipe, store it, put it back from what is stored."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.calibration import BlockContext
from mergequant.errors import CheckpointError
from mergequant.models import ModelShell
from mergequant.nn import LinearSpec, NormSpec, QuantLinear, QuantNorm, build_module, spec_from_dict
from mergequant.pipeline.clock import Clock
from mergequant.recipes import Recipe
from mergequant.steps import BlockStep, ModelStep, SiteStep, Step

__all__ = ["block_layers", "block_tensors", "outside_tensors", "quantize_block", "restore_block", "stored_as"]


def quantize_block(context: BlockContext, recipe: Recipe, clock: Clock | None = None) -> None:
    """Run all steps of a recipe on a block whose float weights are loaded.

    Site steps that stand together run site after site, so that a later site sees the earlier ones as they are by then.
    """
    clock = clock or Clock()
    for steps in _runs(recipe.steps):
        if isinstance(steps[0], BlockStep):
            for step in steps:
                if isinstance(step, BlockStep):
                    with clock.measure(step.name):
                        step.run(context)
            continue
        for site in context.structure.sites:
            acting = [step for step in steps if isinstance(step, SiteStep) and step.applies_to(site)]
            if acting:
                own = context.site(site)
                with clock.measure("inputs of sites"):
                    own.open()
                for step in acting:
                    with clock.measure(step.name):
                        step.run(own)
                own.close()
                if own.solutions:  # rounded: its float weights and targets are not needed any more
                    del context.sites[site.name]
    context.sites.clear()  # context and sites hold each other; memory must not wait for the garbage collector


def block_layers(name: str, block: nn.Module) -> dict[str, LinearSpec | NormSpec]:
    """Descriptions of the quantized modules of a block, by full name."""
    return {
        f"{name}.{path}": module.spec
        for path, module in block.named_modules()
        if isinstance(module, (QuantLinear, QuantNorm))
    }


def block_tensors(name: str, block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a quantized block by full name. What stayed float is stored in `dtype` where that loses nothing."""
    quantized = {path for path, module in block.named_modules() if isinstance(module, (QuantLinear, QuantNorm))}
    tensors = {}
    for path, tensor in block.state_dict().items():
        inside = any(path.startswith(f"{module}.") for module in quantized)
        tensors[f"{name}.{path}"] = tensor.cpu() if inside else stored_as(tensor, dtype)
    return tensors


def outside_tensors(shell: ModelShell) -> dict[str, Tensor]:
    """Tensors outside the blocks by full name, tied ones once, under the first of their names."""
    inside = tuple(f"{name}." for name in shell.block_names)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in shell.model.state_dict(keep_vars=True).items():
        if not name.startswith(inside) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def stored_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float tensor in the dtype it was stored in, if that gives the same values back; else as it is."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow.contiguous()
    return tensor.contiguous()


def restore_block(shell: ModelShell, index: int, layers: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Put block `index` in place as a checkpoint describes it.

    Args:
        shell: the model; the block's float weights are read first, then all of them are replaced.
        layers: descriptions by full name, as dicts or specs; those of other blocks are ignored.
        tensors: all tensors of the block by full name.

    Raises:
        CheckpointError: tensors and descriptions do not make this block.
    """
    name = shell.block_names[index]
    block = shell.load_block(index, transformed=False)  # all of it is replaced
    for full, spec in layers.items():
        if full.startswith(f"{name}."):
            path, _, leaf = full.removeprefix(f"{name}.").rpartition(".")
            module = build_module(spec if isinstance(spec, (LinearSpec, NormSpec)) else spec_from_dict(spec, full))
            _set_out_dtype(module, shell.dtype)
            setattr(block.get_submodule(path), leaf, module.to(shell.device))
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items()}
    try:
        block.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: the stored tensors do not make this block: {error}") from error
    return block


def _set_out_dtype(module: QuantLinear | QuantNorm, dtype: torch.dtype) -> None:
    module.out_dtype = dtype
    if isinstance(module, QuantLinear) and module.input_quantizer is not None:
        module.input_quantizer.out_dtype = dtype


def _runs(steps: tuple[Step, ...]) -> Iterator[list[Step]]:
    """Steps grouped into runs of block steps and runs of site steps; those of the whole model are done by now."""
    acting = [step for step in steps if not isinstance(step, ModelStep)]
    for _, group in groupby(acting, key=lambda step: isinstance(step, BlockStep)):
        yield list(group)
