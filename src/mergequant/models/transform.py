"""Changes of a whole float model that keep its function: what one is, and the proof that it does.

A transform acts on weights on their way from the source: outside the blocks once, on each block whenever it is loaded.
So one block in memory is enough, and everything that follows (calibration, steps, writing) sees only the changed model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergequant.errors import StructureError
from mergequant.models.probe import TOLERANCE, all_double, relative_difference
from mergequant.models.roles import BlockStructure, NormRole

if TYPE_CHECKING:
    from mergequant.models.shell import ModelShell

__all__ = ["ModelTransform", "OutsideParts", "prove_transform"]

PROOF_ROWS = 64  # of the vocabulary: the proof needs some tokens, not a float64 copy of all
PROOF_TOKENS = 16


@dataclass(frozen=True)
class OutsideParts:
    """What surrounds the blocks: the embedding (vocabulary, width), the norm after the last block, the head."""

    embedding: nn.Module
    norm: nn.Module
    norm_role: NormRole
    head: nn.Linear


class ModelTransform(ABC):
    """A function-preserving change of all weights of a model, in place, in whatever float dtype they have.

    The logits stay what they were; hidden states between blocks become `hidden(...)` of what they were.
    """

    @abstractmethod
    def hidden(self, hidden: Tensor) -> Tensor:
        """What hidden states (..., width) of the float model are in the transformed one."""

    @abstractmethod
    def outside(self, parts: OutsideParts) -> None:
        """Change what surrounds the blocks; the head has a weight of its own by then."""

    @abstractmethod
    def block(self, index: int, block: nn.Module, structure: BlockStructure) -> None:
        """Change block `index`, which has just been loaded."""


@torch.no_grad()
def prove_transform(shell: "ModelShell", transform: ModelTransform) -> float:
    """Run each kind of block, and what surrounds the blocks, in float64 with random parameters, before and after.

    Entering hidden states, every block's output and the logits must follow the transform; the composition of these is
    the model. No weights of blocks are read; `shell` is as before afterwards.

    Returns:
        The largest relative deviation.

    Raises:
        StructureError: a deviation is above 1e-10, so the transform does not keep this model's function.
    """
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    seen: set[int] = set()
    for index, structure in enumerate(shell.structures):
        if id(structure) not in seen:  # blocks of one kind share one
            seen.add(id(structure))
            block, run, hidden = shell.random_block(index, generator)
            before = run(block, hidden)
            transform.block(index, block, structure)
            after = run(block, transform.hidden(hidden))
            worst = max(worst, _checked(shell.block_names[index], after, transform.hidden(before)))
    with _random_outside(shell, generator), all_double():
        rows = min(PROOF_ROWS, shell.vocabulary)
        ids = torch.randint(rows, (2, min(PROOF_TOKENS, shell.max_positions or PROOF_TOKENS)), generator=generator)
        entering, _ = shell.block_kwargs(ids)
        leaving = torch.randn(entering.shape, dtype=torch.float64, generator=generator).to(entering.device)
        logits = shell.logits(ids, leaving)
        transform.outside(shell.outside_parts())
        changed, _ = shell.block_kwargs(ids)
        worst = max(worst, _checked("the embedding", changed, transform.hidden(entering)))
        again = shell.logits(ids, transform.hidden(leaving))
        return max(worst, _checked("the final norm and the head", again, logits))


def _checked(what: str, found: Tensor, expected: Tensor) -> float:
    deviation = relative_difference(found, expected)
    if not deviation <= TOLERANCE:
        raise StructureError(
            f"{what}: transforming the model changes its function by {deviation:.1e} (relative, float64), so something "
            "in it does not commute with the transform. Choose a recipe that leaves the residual stream as it is: "
            "mergequant-plus, or gptq"
        )
    return deviation


@contextmanager
def _random_outside(shell: "ModelShell", generator: torch.Generator) -> Iterator[None]:
    """Random float64 parameters outside the blocks for a while, embedding and head cut to a few rows."""
    inside = tuple(f"{name}." for name in shell.block_names)
    parts = shell.outside_parts()
    cut = {id(parts.embedding), id(parts.head)}
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    drawn: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for path, module in shell.model.named_modules():
        if f"{path}.".startswith(inside):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            rows = min(PROOF_ROWS, parameter.shape[0]) if id(module) in cut else parameter.shape[0]
            if id(parameter) not in drawn:
                value = torch.randn(rows, *parameter.shape[1:], dtype=torch.float64, generator=generator)
                value = value * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.2 * value
                drawn[id(parameter)] = nn.Parameter(value.to(parameter.device), requires_grad=False)
            kept.append((module, name, parameter))
            module._parameters[name] = drawn[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
