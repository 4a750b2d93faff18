"""Block-wise reconstruction: train some parameters of a block so that its output is that of the float block again.

Shared by what learns in a block (FlatQuant's transforms and clips, low-rank corrections). Rounding passes gradients
straight through: `fake_quantize` has the gradient of the unrounded values inside the grid, and none outside, where the
scale gets it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.calibration import ActivationStore, BlockContext
from mergequant.errors import NumericsError, RecipeError
from mergequant.grids import IntegerGrid

__all__ = ["Training", "fake_quantize", "reconstruct"]

LEAST_STEPS = 100  # that a path by signs is divided into, so that a short training takes no long strides


@dataclass(frozen=True)
class Training:
    """How long and on what a block is trained.

    Attributes:
        epochs: passes over the data; 0 = nothing is trained.
        chunks: calibration chunks (of about 4096 tokens) used, from the first.
        batch_tokens: tokens of one step of the optimizer, in whole windows; 0 = a chunk.
        even: divide each step's loss by its own value, so that batches count alike, however large their errors.
        sign: step by the sign of the gradient instead of AdamW; rates are then divided by the number of steps (or by
            `LEAST_STEPS`) and fall in a line, so that a parameter moves by half its rate at most.
    """

    epochs: int
    chunks: int
    batch_tokens: int = 0
    even: bool = False
    sign: bool = False


def reconstruct(
    context: BlockContext, block: nn.Module, rates: Mapping[str, float], training: Training, advice: str = ""
) -> list[float]:
    """Train parameters of `block`, a changed copy of the context's block, against what the context's block gives.

    Inputs are the hidden states that enter the block (quantized upstream); they and the targets lie where the run's
    `StorePolicy` lets them, and one batch at a time is on the device. AdamW without weight decay, learning rates fall
    by a cosine to zero (`Training.sign`: other rules). Batches come in order, so a run is repeated exactly.

    Args:
        context: the block, in floating point.
        block: called like the context's block.
        rates: learning rates by patterns of parameter names ("*.clip"); what matches none is left alone.
        training: see `Training`.
        advice: what to do if it diverges, for the message.

    Returns:
        The mean relative error of the block's output during every epoch: squared error over the energy of what the
        block adds to its input, which is what quantization can spoil.

    Raises:
        RecipeError: a pattern that matches nothing.
        NumericsError: the loss is not finite.
    """
    groups = _groups(block, rates)
    chain = context.chain
    numbers = chain.numbers("calibration")[: training.chunks]
    targets = ActivationStore(chain.policy)
    for number in numbers:
        targets.append(chain.run(chain.hidden[number]))
    batches = sum(len(_parts(chain.hidden[number], training)) for number in numbers)
    steps = max(training.epochs * batches, 1)
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    if training.sign:
        optimizer = _SignDescent([{**group, "lr": group["lr"] / max(steps, LEAST_STEPS)} for group in groups], {})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[float] = []
    try:
        with torch.enable_grad():
            for _ in range(training.epochs):
                total = 0.0
                for hidden, target in _batches(context, numbers, targets, training):
                    output = block(hidden, **chain.arguments(hidden))
                    output = output[0] if isinstance(output, tuple) else output
                    loss = (output - target).square().sum() / (target - hidden).square().sum().clamp_min(1e-30)
                    if not torch.isfinite(loss):
                        raise NumericsError(f"{context.name}: training on its output diverged; {advice}")
                    optimizer.zero_grad()
                    (loss / loss.detach().clamp_min(1e-30) if training.even else loss).backward()
                    optimizer.step()
                    schedule.step()
                    total += float(loss.detach())
                history.append(total / batches)
                context.progress(
                    f"{context.name}: training, epoch {len(history)} of {training.epochs}, error {history[-1]:.4f}"
                )
    finally:
        targets.close()
    return history


def fake_quantize(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Values rounded to the grid of `scale` (broadcast), with gradients for both (Esser et al., arXiv 1902.08153)."""
    rounded: Tensor = _FakeQuantize.apply(values, scale, IntegerGrid(bits))
    return rounded


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, grid: IntegerGrid) -> Tensor:
        scaled = values / scale
        codes = grid.nearest(scaled)
        inside = (scaled >= grid.low) & (scaled <= grid.high)
        ctx.save_for_backward(inside, codes - scaled * inside)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        inside, slope = ctx.saved_tensors
        return gradient * inside, (gradient * slope).sum(-1, keepdim=True), None


class _SignDescent(torch.optim.Optimizer):
    """Every parameter steps by its learning rate, against the sign of its gradient."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def _groups(block: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer; all other parameters keep their values."""
    taken: set[str] = set()
    groups: list[dict[str, Any]] = []
    for pattern, rate in rates.items():
        own = {name: p for name, p in block.named_parameters() if fnmatchcase(name, pattern) and name not in taken}
        if not own:
            raise RecipeError(f"reconstruct: no parameter of the block is called {pattern!r}")
        taken |= set(own)
        groups.append({"params": list(own.values()), "lr": rate})
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in taken)
    return groups


def _batches(
    context: BlockContext, numbers: list[int], targets: ActivationStore, training: Training
) -> Iterator[tuple[Tensor, Tensor]]:
    for position, number in enumerate(numbers):
        yield from zip(_parts(context.chain.hidden[number], training), _parts(targets[position], training))


def _parts(chunk: Tensor, training: Training) -> tuple[Tensor, ...]:
    """A chunk (windows, tokens, width) in batches of whole windows."""
    if not training.batch_tokens:
        return (chunk,)
    return chunk.split(max(training.batch_tokens // chunk.shape[1], 1))
