"""QLLM's channel reassembly: strong channels are taken apart, and like ones put together, so that the width is kept.

Disassembly: T copies of x / T, each with the whole weight column; exact. Assembly: a group of n channels shares a slot,
which holds their mean, with the sum of their columns. 1 / T and 1 / n are constants of a channel, so whatever feeds the
site can absorb them (`Reassembly.divisor`); a gather and a sum remain for the run time (`ops.reassemble`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.transforms.schemes import ReassembledScheme

__all__ = ["Distance", "Reassembly", "disassemblies", "merge_distance", "merge_groups"]

Distance = Literal["output", "sums"]
LEAST_STEPS = 100  # of the thresholds; more where the largest magnitude is above 50
FINEST_STEP = 0.5  # of the thresholds, in units of the input


@dataclass(frozen=True)
class Reassembly:
    """Which channel gets how many slots, and which channels share one.

    Attributes:
        copies: int64 (channels,), slots of each channel; 1 for channels that share a slot.
        group: int64 (channels,), the channel at the head of each channel's slot: itself, unless it joins another.
    """

    copies: Tensor
    group: Tensor

    @classmethod
    def apart(cls, copies: Tensor) -> "Reassembly":
        """Disassembly alone: the width grows."""
        return cls(copies, torch.arange(copies.shape[0], device=copies.device))

    @property
    def divisor(self) -> Tensor:
        """What each channel is divided by before it reaches its slots: copies, or channels that share its slot."""
        return self.copies * torch.bincount(self.group, minlength=self.group.shape[0])[self.group]

    def scheme(self, bits: int) -> ReassembledScheme:
        """The scheme of an input whose channels have been divided by `divisor`, its weight columns multiplied by it."""
        channels = self.group.shape[0]
        members = torch.bincount(self.group, minlength=channels)
        heads = (members > 1).nonzero().flatten()
        heads = heads[torch.argsort(members[heads], descending=True, stable=True)]
        single = (members == 1).nonzero().flatten()
        slots = torch.cat([heads, torch.repeat_interleave(single, self.copies[single])])
        rank = torch.zeros_like(members)
        rank[heads] = torch.arange(heads.shape[0], device=rank.device)
        joined = (self.group != torch.arange(channels, device=self.group.device)).nonzero().flatten()
        joined = joined[torch.argsort(rank[self.group[joined]], stable=True)]  # behind one another by head
        count = members[heads] - 1
        first = torch.cumsum(count, 0) - count
        rounds = [joined[first[count > number] + number] for number in range(int(count[0]) if heads.numel() else 0)]
        share = (1 / self.divisor.double())[slots]
        return ReassembledScheme(bits, torch.cat([slots, *rounds]), share, tuple(one.shape[0] for one in rounds))


def disassemblies(strength: Tensor, most: int) -> dict[float, Tensor]:
    """Copies for every threshold that gives another number of extra slots, from none up to `most`.

    A channel as strong as T thresholds gets T copies. Thresholds go down from the largest strength to the smallest in
    steps of a hundredth of the way, or of 0.5 if that is less, as in the reference code.

    Args:
        strength: (channels,), largest magnitude of each channel.
        most: extra slots allowed.

    Returns:
        By threshold, int64 (channels,).
    """
    strength = strength.double()
    low, high = float(strength.min()), float(strength.max())
    steps = max(LEAST_STEPS, int(high / FINEST_STEP))
    found = {high: torch.ones(strength.shape[0], dtype=torch.int64, device=strength.device)}
    known = 0
    for step in range(steps - 1, 0, -1):
        threshold = low + (high - low) * step / steps
        if threshold <= 0:
            break
        copies = torch.ceil(strength / threshold - 1e-9).clamp_min(1)
        extra = float(copies.sum()) - strength.shape[0]
        if extra > most:
            break
        if extra > known:
            found[threshold], known = copies.long(), int(extra)
    return found


def merge_distance(gram: Tensor, weight: Tensor, kind: Distance = "output") -> Tensor:
    """What it costs to let an even and an odd channel share a slot.

    "output" is the squared change of the outputs, summed over tokens: ||x_i - x_j||^2 ||W_i - W_j||^2 / 4, which the
    paper's sum over tokens and outputs comes down to. "sums" is what its code computes: (||x_i - x_j|| times the sum of
    W_i + W_j over outputs)^2.

    Args:
        gram: sum over tokens of x x^T, float64 (channels, channels).
        weight: of all consumers, (outputs, channels).

    Returns:
        float64 (even channels, odd channels).
    """
    weight = weight.double()
    if kind == "sums":
        total = weight.sum(0)
        return _apart(gram) * (total[0::2, None] + total[None, 1::2]).square()
    return _apart(gram) * _apart(weight.t() @ weight) / 4


def _apart(gram: Tensor) -> Tensor:
    """||a_i - a_j||^2 of even i and odd j out of all inner products."""
    energy = torch.diagonal(gram)
    return (energy[0::2, None] + energy[None, 1::2] - 2 * gram[0::2, 1::2]).clamp_min(0)


def merge_groups(distance: Tensor, split: Tensor, count: int) -> Tensor:
    """Which channels share a slot, by bipartite soft matching: the `count` cheapest even channels join odd ones.

    Several even channels may join one odd channel. Channels that were split share with nobody.

    Args:
        distance: of `merge_distance`.
        split: bool (channels,).
        count: slots to save.

    Returns:
        int64 (channels,), as `Reassembly.group`.

    Raises:
        UsageError: fewer than `count` even channels are whole, or no odd one.
    """
    whole = ~split
    able = int(whole[0::2].sum()) if bool(whole[1::2].any()) else 0
    if count > able:
        raise UsageError(f"{count} channels are to be merged, but only {able} can be; allow fewer copies")
    open_to = whole[0::2, None] & whole[None, 1::2]
    least, partner = torch.where(open_to, distance, torch.full_like(distance, torch.inf)).min(1)
    joining = torch.argsort(least, stable=True)[:count]
    group = torch.arange(split.shape[0], device=split.device)
    group[2 * joining] = 2 * partner[joining] + 1
    return group
