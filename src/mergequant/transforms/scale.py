"""Channel scales: an input channel is divided by s and its weight columns are multiplied by s, which changes nothing.

What s is for differs: SmoothQuant (arXiv 2211.10438) evens out inputs and weights, AWQ (arXiv 2306.00978) makes columns
that meet large inputs large, so that their rounding errors become relatively smaller, Outlier Suppression+ (arXiv
2304.09145) brings the channels above a threshold down to it and touches no other.
"""

import torch
from torch import Tensor

from mergequant.grids import Quantizer
from mergequant.transforms.clip import even_fractions

__all__ = ["activation_aware_scale", "clip_groups", "smoothing_scale", "threshold_scale"]

SMOOTH_FLOOR = 1e-5  # of weights and of scales, as in SmoothQuant's code
AWARE_FLOOR = 1e-4  # of scales, as in AWQ's code


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's s = max|X|^alpha / max|W|^(1 - alpha) (section 4, equation 4).

    Args:
        inputs: largest magnitude of every channel (channels,).
        weights: largest magnitude of every column over all consumers (channels,).
        alpha: how much of the difficulty moves into the weights. 0 is not "no scaling": it evens out the columns.

    Returns:
        (channels,), positive; 1 for channels whose input is always zero.
    """
    scale = inputs.pow(alpha) / weights.clamp_min(SMOOTH_FLOOR).pow(1 - alpha)
    return torch.where(inputs > 0, scale.clamp_min(SMOOTH_FLOOR), torch.ones_like(scale))


def activation_aware_scale(inputs: Tensor, ratio: float) -> Tensor:
    """AWQ's s = mean|X|^ratio, divided by sqrt(max s * min s) (section 3.2, and the reference code).

    Args:
        inputs: mean magnitude of every channel (channels,).
        ratio: 0 gives s = 1 exactly.

    Returns:
        (channels,), positive.
    """
    scale = inputs.pow(ratio).clamp_min(AWARE_FLOOR)
    return scale / (scale.max() * scale.min()).sqrt()


def threshold_scale(inputs: Tensor, share: float) -> Tensor:
    """Outlier Suppression+'s s = max(1, max|X| / t), with the threshold t = share * max|X| over all channels.

    Args:
        inputs: largest magnitude of every channel (channels,); of shifted inputs, where these are shifted.
        share: in (0, 1]; 1 gives s = 1 exactly.

    Returns:
        (channels,), 1 for all channels within the threshold.
    """
    return (inputs / (share * inputs.max()).clamp_min(torch.finfo(inputs.dtype).tiny)).clamp_min(1)


def clip_groups(weight: Tensor, gram: Tensor, quantizer: Quantizer, *, least: float, steps: int) -> Tensor:
    """Clamp every row and group of a weight to the share of its range that costs least at the output (AWQ).

    The loss is that of the group's own part of the dot products, summed over tokens: dw^T G dw, with G the group's
    block of the inputs' Gram matrix.

    Args:
        weight: (outputs, width).
        gram: raw sum of x x^T (width, width).
        quantizer: the quantizer that will round, with a range of absmax.
        least: smallest share tried.
        steps: number of shares tried, from 1 down.

    Returns:
        Clamped weight (outputs, width). The share 1 is among those tried, so no group's loss rises.

    Raises:
        UsageError: the group size does not divide the width.
    """
    groups = quantizer.groups(weight.shape[1])
    grouped = weight.float().reshape(weight.shape[0], groups, -1)  # (outputs, groups, size)
    size = grouped.shape[2]
    blocks = gram.float().reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    largest = grouped.abs().amax(-1, keepdim=True)
    best, least_loss = grouped, torch.full_like(largest, torch.inf)
    for share in even_fractions(least, steps):
        bound = largest * share
        clamped = torch.maximum(torch.minimum(grouped, bound), -bound)
        rounded = quantizer.encode(clamped.reshape(weight.shape)).decode().reshape(grouped.shape)
        error = (rounded - grouped).transpose(0, 1)  # (groups, outputs, size)
        loss = (torch.bmm(error, blocks) * error).sum(-1).t()[..., None]
        better = loss < least_loss
        least_loss = torch.where(better, loss, least_loss)
        best = torch.where(better, clamped, best)
    return best.reshape(weight.shape)
