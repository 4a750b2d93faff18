"""What the float architecture of a checkpoint looks like: names, norms, and which linear layer reads which norm.

The architecture is run once on the meta device, where a tensor has a shape and no content: hooks see which linear
layers read the very tensor that a norm gave. Nothing is told by a name.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from mergequant.checkpoint import Checkpoint
from mergequant.errors import CheckpointError, UsageError
from mergequant.models import NormRole, model_class
from mergequant.models.probe import identify_norm
from mergequant.models.skeleton import build_skeleton
from mergequant.nn import NormSpec

__all__ = ["Outline", "outline"]

TOKENS = 4  # of the run on the meta device
EPS_TOLERANCE = 1e-6  # relative


@dataclass(frozen=True)
class Outline:
    """The float architecture.

    Attributes:
        shapes: of all parameters and persistent buffers, by full name.
        linears: full names of all linear layers.
        norms: role of every quantized norm, by its full name.
        reads: full name of the norm that a linear layer reads, by the layer's full name.
    """

    shapes: dict[str, tuple[int, ...]]
    linears: tuple[str, ...]
    norms: dict[str, NormRole]
    reads: dict[str, str]


def outline(checkpoint: Checkpoint) -> Outline:
    """The outline of the float model that a checkpoint was made from.

    Raises:
        CheckpointError: the config's architecture does not have the layers that the checkpoint describes.
    """
    config: Any = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = build_skeleton(model_class(config), config, None)
    model.to("meta")
    modules = dict(model.named_modules())
    norms: dict[str, NormRole] = {}
    for name, spec in checkpoint.quantization.layers.items():
        module = modules.get(name)
        if isinstance(spec, NormSpec):
            norms[name] = _role(name, spec, module)
        elif not isinstance(module, nn.Linear) or module.out_features != spec.outputs:
            raise CheckpointError(
                f"{name}: {type(model).__name__} has no linear layer of {spec.outputs} outputs there, so no other "
                "engine could load it; fetch or write the checkpoint again"
            )
    return Outline(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tuple(name for name, module in modules.items() if isinstance(module, nn.Linear)),
        norms,
        _readers(model, norms) if norms else {},
    )


def _role(name: str, spec: NormSpec, module: nn.Module | None) -> NormRole:
    """The proven role of a float norm, which must be of the kind and eps that the checkpoint describes."""
    role = None
    if module is not None:
        norm = copy.deepcopy(module).to_empty(device="cpu").double()
        generator = torch.Generator().manual_seed(0)
        for parameter in norm.parameters():
            parameter.data.normal_(generator=generator)
        role = identify_norm(name, norm, spec.channels, generator)
    if role is None or role.kind != spec.norm or abs(role.eps - spec.eps) > EPS_TOLERANCE * spec.eps:
        raise CheckpointError(
            f"{name}: the checkpoint has a {spec.norm} norm of {spec.channels} channels with eps {spec.eps} there, "
            f"the architecture has {role or 'none'}; fetch or write the checkpoint again"
        )
    return role


def _readers(model: Any, norms: dict[str, NormRole]) -> dict[str, str]:
    """Which norm each linear layer reads."""
    given: dict[int, tuple[str, torch.Tensor]] = {}  # tensors are kept, so that no address is used twice
    found: dict[str, str] = {}

    def emit(name: str) -> Any:
        return lambda _module, _args, output: given.__setitem__(id(output), (name, output))

    def read(name: str) -> Any:
        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in given:
                found[name] = given[id(args[0])][0]

        return see

    for name, module in model.named_modules():
        if name in norms:
            module.register_forward_hook(emit(name))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(read(name))
    with torch.device("meta"), torch.no_grad():
        tokens, refusals = torch.zeros(1, TOKENS, dtype=torch.long), []
        # Tensors without content cannot be asked what they hold: some models look into a mask, others make one up.
        for mask in (torch.zeros(1, 1, TOKENS, TOKENS), torch.ones(1, TOKENS), None):
            try:
                model(tokens, attention_mask=mask, use_cache=False)
                return found
            except Exception as error:  # whatever a model class raises
                refusals.append(f"{type(error).__name__}: {error}")
    raise UsageError(f"{type(model).__name__} does not run without content, so its norms stay unknown: {refusals[0]}")
