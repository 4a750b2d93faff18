"""Clip searches: which share of a range the grid should cover."""

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid

__all__ = ["channel_clip_ratios", "even_fractions"]


def even_fractions(least: float, steps: int) -> list[float]:
    """`steps` fractions from 1 down to `least`."""
    if steps == 1:
        return [1.0]
    return [1 - (1 - least) * i / (steps - 1) for i in range(steps)]


def channel_clip_ratios(
    x: Tensor, step: Tensor, copies: Tensor, bits: int, *, stagger: bool, norm: float, least: float, steps: int
) -> Tensor:
    """Clip ratio of every channel with the least sum over tokens of |error|^norm on the activations.

    Staggered copies of a channel act together as a grid `copies` times finer, and so are searched as one.

    Args:
        x: float tokens (tokens, channels).
        step: float32 (channels,), unclipped steps.
        copies: int64 (channels,).
        bits: width of the clamp.
        stagger: whether copies are staggered.
        norm: exponent of the error.
        least: smallest ratio tried.
        steps: number of ratios tried.

    Returns:
        float32 (channels,), in [least, 1].
    """
    grid = IntegerGrid(bits)
    finer = copies.to(step.dtype) if stagger else torch.ones_like(step)
    best_ratio, best_loss = torch.ones_like(step), torch.full_like(step, torch.inf)
    safe = torch.where(step > 0, step, torch.ones_like(step))
    for ratio in even_fractions(least, steps):
        fine = safe * ratio / finer
        codes = grid.nearest(x / fine, finer)
        loss = (codes.mul_(fine).sub_(x)).abs_().pow_(norm).sum(0)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_ratio = torch.where(better, torch.full_like(step, ratio), best_ratio)
    return best_ratio
