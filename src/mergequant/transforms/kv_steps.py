"""Static steps of a quantized cache: one per head and channel, from a sample of its keys or values.

At 8 bits the largest magnitude of the sample sets the step. At 4 bits the range is searched for the least sum of
|error|^3: squares clip the rare large keys too much, which attention looks at most (measured on the reference models,
`docs/log.md`).
"""

import torch
from torch import Tensor

from mergequant.ops import kv_layout
from mergequant.transforms.clip import even_fractions

__all__ = ["kv_error", "kv_steps"]

SMALLEST_RANGE = 1e-30  # below it a step's reciprocal would leave float32; such a channel is zero for all purposes
CLIPPED_BITS = 4  # clipping pays up to here; at 8 bits the grid is fine enough for everything
LEAST_FRACTION, FRACTIONS = 0.4, 25


def kv_steps(sample: Tensor, bits: int) -> Tensor:
    """Steps for codes of `bits` bits.

    Args:
        sample: float keys or values (tokens, heads, width).
        bits: 4 or 8.

    Returns:
        float32 (heads, width), positive; a channel that is zero everywhere gets 1 / largest code.
    """
    sample = sample.float()
    limit = kv_layout.code_limit(bits)
    largest = sample.abs().amax(0)
    largest = torch.where(largest > SMALLEST_RANGE, largest, torch.ones_like(largest))
    best = largest / limit
    if bits > CLIPPED_BITS:
        return best
    least = torch.full_like(largest, torch.inf)
    for fraction in even_fractions(LEAST_FRACTION, FRACTIONS):
        step = largest * fraction / limit
        error = kv_layout.quantize(sample, step, bits).float().mul_(step).sub_(sample)
        loss = error.abs().mul_(error.square_()).sum(0)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, step, best)
    return best


def kv_error(sample: Tensor, step: Tensor, bits: int) -> float:
    """Squared error of the rounded sample, relative to its own square."""
    sample = sample.float()
    error = kv_layout.quantize(sample, step, bits).float().mul_(step).sub_(sample)
    return float(error.square().sum() / sample.square().sum().clamp_min(SMALLEST_RANGE))
