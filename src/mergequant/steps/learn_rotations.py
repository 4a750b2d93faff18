"""Learned rotations of the residual stream and of the value heads (SpinQuant, arXiv 2405.16406, section 3)."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.errors import NumericsError, RecipeError
from mergequant.grids import IntegerGrid
from mergequant.models import ModelShell, ModelTransform, Site
from mergequant.steps.base import LearningStep
from mergequant.steps.reconstruct import fake_quantize
from mergequant.steps.residual import ResidualRotation, RotateResidual
from mergequant.transforms import cayley_step, nearest_orthogonal

__all__ = ["LearnRotations", "LearnedRotation"]

RESIDUAL = "residual"  # names of what is learned: this, and "head.<block>"
REPAIR_EVERY = 16  # steps after which rounding errors of the rotations are removed


@dataclass(frozen=True)
class LearnRotations(RotateResidual, LearningStep):
    """`RotateResidual`, then rotations on top of it that are learned from the calibration windows by Cayley SGD.

    The loss is the next-token cross entropy of the model with rounded inputs and float weights (what SpinQuant learns
    with before GPTQ). Rotations commute with everything but rounding, so the loop leaves the weights alone and rounds
    each input in the rotated basis: x -> q(x R) R^T. The whole float model is in memory while it learns.

    Attributes:
        bits, clip_ratio: of the inputs in the loop; a scale per token.
        steps: steps of SGD; rate: its step size, falling to zero by a cosine.
        batch_tokens: tokens of a step, in whole windows.
    """

    name: ClassVar[str] = "learn_rotations"
    bits: int = 4
    clip_ratio: float = 0.9
    steps: int = 100
    rate: float = 1.5
    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.batch_tokens < 1 or not 0 < self.clip_ratio <= 1:
            raise RecipeError(
                f"learn_rotations: steps {self.steps}, rate {self.rate} and batch_tokens {self.batch_tokens} must be "
                f"positive, clip_ratio {self.clip_ratio} in (0, 1]"
            )

    def learn(
        self, shell: ModelShell, windows: Tensor, seed: int, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        rotations = self._identities(shell)
        batch = max(self.batch_tokens // windows.shape[1], 1)
        order = torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))
        batches = order.split(batch)
        for index in range(len(shell.blocks)):
            shell.load_block(index)
        try:
            with self._rounded_inputs(shell, rotations), torch.enable_grad():
                for number in range(self.steps):
                    loss = _cross_entropy(shell, windows[batches[number % len(batches)]])
                    if not torch.isfinite(loss):
                        raise NumericsError(f"learning diverged; lower learn_rotations.rate (now {self.rate})")
                    loss.backward()
                    self._update(rotations, number)
                    progress(f"learning rotations, step {number + 1} of {self.steps}, loss {float(loss.detach()):.4f}")
        finally:
            for index in range(len(shell.blocks)):
                shell.release_block(index)
        return {name: nearest_orthogonal(value.detach().double()).cpu() for name, value in rotations.items()}

    def refine(self, shell: ModelShell, learned: Mapping[str, Tensor]) -> ModelTransform:
        heads = [learned[_head(index)] for index in range(len(shell.blocks))] if self.heads else []
        return LearnedRotation(
            signs=torch.ones(learned[RESIDUAL].shape[0], dtype=torch.float64, device=shell.device),
            head_width=heads[0].shape[0] if heads else 0,
            matrix=learned[RESIDUAL].to(shell.device),
            heads=tuple(head.to(shell.device) for head in heads),
        )

    def _identities(self, shell: ModelShell) -> dict[str, Tensor]:
        first = self.transform(shell, 0)
        if not isinstance(first, ResidualRotation):
            raise RecipeError("learn_rotations: needs the rotation of the residual stream to begin from")
        sizes = {RESIDUAL: first.signs.shape[0]}
        if first.head_width:
            sizes |= {_head(index): first.head_width for index in range(len(shell.blocks))}
        return {name: torch.eye(size, device=shell.device).requires_grad_() for name, size in sizes.items()}

    @torch.no_grad()
    def _update(self, rotations: dict[str, Tensor], number: int) -> None:
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * number / self.steps))
        for value in rotations.values():
            if value.grad is None:
                continue
            moved = cayley_step(value, value.grad, rate)
            value.copy_(nearest_orthogonal(moved) if number % REPAIR_EVERY == REPAIR_EVERY - 1 else moved)
            value.grad = None

    @contextmanager
    def _rounded_inputs(self, shell: ModelShell, rotations: Mapping[str, Tensor]) -> Iterator[None]:
        """Inputs of all sites are rounded in their rotated basis for a while."""
        with ExitStack() as stack:
            for index, structure in enumerate(shell.structures):
                for site in structure.sites:
                    through = self._rounding(site, rotations[RESIDUAL], rotations.get(_head(index)))
                    block = shell.blocks[index]
                    if site.norm is not None:
                        norm = block.get_submodule(site.norm.name)
                        stack.callback(norm.register_forward_hook(_on_output(through)).remove)
                        continue
                    for name in site.consumers:
                        linear = block.get_submodule(name)
                        stack.callback(linear.register_forward_pre_hook(_on_input(through)).remove)
            yield

    def _rounding(self, site: Site, residual: Tensor, head: Tensor | None) -> Callable[[Tensor], Tensor]:
        turn = ops.rotation(site.width)
        left, right = (factor.to(residual) for factor in (turn.left, turn.right))

        def through(x: Tensor) -> Tensor:
            if site.kind == "norm":
                return self._round(x @ residual) @ residual.t()
            if site.kind == "attention_output":
                if head is None:
                    return self._round(x)
                return _by_head(self._round(_by_head(x, head)), head.t())
            grid = x.reshape(-1, left.shape[0], right.shape[0])
            rounded = self._round((left.t() @ (grid @ right)).reshape(x.shape)).reshape(grid.shape)
            return (left @ (rounded @ right.t())).reshape(x.shape)

        return through

    def _round(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) * (self.clip_ratio / IntegerGrid(self.bits).high)
        return fake_quantize(x, scale.clamp_min(1e-12), self.bits)


@dataclass(frozen=True)
class LearnedRotation(ResidualRotation):
    """x -> x R for the residual stream, v -> v R_i for the values of each head in block i.

    Attributes:
        matrix: float64 orthogonal (width, width).
        heads: by block, float64 orthogonal (head_width, head_width); empty = heads are left alone.
    """

    matrix: Tensor = field(default_factory=lambda: torch.empty(0))
    heads: tuple[Tensor, ...] = ()

    def hidden(self, hidden: Tensor) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return hidden.to(dtype) @ self.matrix.to(dtype)

    def by_head(self, value: Tensor, index: int) -> Tensor:
        return _by_head(value, self.heads[index].to(value))


def _head(index: int) -> str:
    return f"head.{index}"


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """Each head's channels along the last axis times a matrix (head_width, head_width)."""
    return (x.unflatten(-1, (-1, matrix.shape[0])) @ matrix).flatten(-2)


def _cross_entropy(shell: ModelShell, tokens: Tensor) -> Tensor:
    """Mean next-token cross entropy of windows (windows, tokens)."""
    tokens = tokens.to(shell.device)
    logits: Tensor = shell.model(tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _on_output(through: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda _module, _args, output: through(output)


def _on_input(through: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda _module, args: (through(args[0]), *args[1:])
