"""Dimension reconstruction: strong channels are split into copies, weak ones dropped (MergeQuant digest, step 4).

A channel split T ways gives T slots with the same code and a T-th of the weight each. Staggered copies (our extension,
digest choice A) round at T different phases: by Hermite's identity the sum over t of round(z + (t + 1/2)/T - 1/2)
equals round(T z) up to ties, so a channel split T ways gains log2(T) bits.
"""

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.transforms.schemes import ChannelScheme

__all__ = ["drop_slots", "split_channels", "split_counts"]

BISECTION_STEPS = 60


def split_counts(strength: Tensor, budget: int) -> Tensor:
    """Copies per channel so that strength / copies is as even as the budget of extra slots allows.

    The least threshold theta with sum(ceil(strength / theta) - 1) <= budget is found by bisection; what ties leave of
    the budget goes to the channels that are then the strongest per copy, so that the budget is used up exactly.

    Args:
        strength: (channels,), non-negative.
        budget: number of extra slots.

    Returns:
        int64 (channels,), each >= 1, summing to channels + budget.
    """
    copies = torch.ones(strength.shape[0], dtype=torch.int64, device=strength.device)
    if budget <= 0 or not bool((strength > 0).any()):
        return copies
    strength = strength.double()
    low, high = 0.0, float(strength.max())
    for _ in range(BISECTION_STEPS):
        theta = (low + high) / 2
        extra = float((torch.ceil(strength / theta).clamp_min(1) - 1).sum()) if theta > 0 else float("inf")
        low, high = (low, theta) if extra <= budget else (theta, high)
    copies = torch.ceil(strength / high - 1e-9).clamp_min(1).long()
    for _ in range(budget - int(copies.sum() - copies.shape[0])):
        copies[torch.argmax(strength / copies)] += 1
    return copies


def split_channels(step: Tensor, copies: Tensor, bits: int, *, stagger: bool) -> ChannelScheme:
    """Slots for channels split into copies, copies of a channel side by side."""
    channels = torch.arange(step.shape[0], device=step.device)
    index = torch.repeat_interleave(channels, copies)
    count = copies[index].to(step.dtype)
    first = torch.cumsum(copies, 0) - copies
    position = (torch.arange(index.shape[0], device=step.device) - first[index]).to(step.dtype)
    offset = (position + 0.5) / count - 0.5 if stagger else torch.zeros_like(count)
    return ChannelScheme(bits, step, index, 1 / count, offset)


def drop_slots(scheme: ChannelScheme, energy: Tensor, folded: Tensor, count: int) -> ChannelScheme:
    """Drop the `count` least important slots of unsplit channels (digest choice C).

    Importance of a slot is its code's energy times its weight column's: (q^T q)_kk * ||W'_k||^2.

    Args:
        scheme: the split scheme.
        energy: sum over tokens of q_k^2, by channel (channels,). Only unsplit channels' count, whose codes are the same
            whatever is split beside them.
        folded: W' of all consumers stacked (outputs, width).
        count: number of slots to drop; at most the number of unsplit channels.

    Raises:
        UsageError: fewer than `count` channels are unsplit. A copy must never be dropped: the others carry only a part
            of its channel's weight.
    """
    unsplit = int((scheme.share == 1).sum())
    if count > unsplit:
        raise UsageError(
            f"{count} slots are to be dropped, but only {unsplit} channels are not split; split less, or keep the width"
        )
    importance = energy.double()[scheme.index] * folded.double().square().sum(0)
    importance = torch.where(scheme.share < 1, torch.full_like(importance, torch.inf), importance)
    dropped = torch.argsort(importance, stable=True)[:count]
    kept = torch.ones(scheme.width, dtype=torch.bool, device=dropped.device)
    kept[dropped] = False
    return scheme.keep(kept)
