"""`reassemble`: channels copied, and channels added up, on their way to a linear layer (QLLM's gather).

Slot j reads channel index[j]. What is added to it follows behind: round r adds one more channel to each of the first
merges[r] slots. So slots that hold several channels come first, those with most of them at the very front; no slot is
written twice in a round, and sums come out the same on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["reassemble"]


def reassemble(x: Tensor, index: Tensor, merges: Sequence[int]) -> Tensor:
    """Slots out of channels.

    Args:
        x: (..., channels) float.
        index: integers (width + sum(merges),), channel that is read for each slot, then those that are added.
        merges: number of slots that each round adds to, not increasing.

    Returns:
        (..., width), in float32, or in float64 if x is.
    """
    read = x.to(torch.promote_types(x.dtype, torch.float32)).index_select(-1, index)
    width = index.shape[0] - sum(merges)
    if not merges:
        return read
    most, first = merges[0], width
    sums = read[..., :most].clone()
    for count in merges:
        sums[..., :count] += read[..., first : first + count]
        first += count
    return torch.cat([sums, read[..., most:width]], -1)
