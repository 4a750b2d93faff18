"""Channel shifts: a constant per channel leaves the norm and comes back as W shift in the biases; nothing changes.

What it is for: a channel that lives in [30, 50] needs a grid of 50, and one of 10 once it is centred (Outlier
Suppression+, arXiv 2304.09145; OutlierTune, arXiv 2406.18832).
"""

import torch
from torch import Tensor

__all__ = ["middles", "without_small"]


def middles(windows: Tensor) -> Tensor:
    """(max + min) / 2 of every channel (windows, width), over the tokens of windows (windows, tokens, width)."""
    return (windows.amax(1) + windows.amin(1)) / 2


def without_small(shift: Tensor, share: float) -> Tensor:
    """Shifts (width,) below a share of the largest magnitude become 0 (OutlierTune's code, which forgets the sign)."""
    return torch.where(shift.abs() >= share * shift.abs().max(), shift, torch.zeros_like(shift))
