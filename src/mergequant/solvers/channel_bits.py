"""CMPQ: a width of its own for every input channel, levels of its own for every column, single values beside them.

"Channel-Wise Mixed-Precision Quantization for Large Language Models", arXiv 2410.13056: channels of strong activations
get more bits, levels are found by k-means, and two kinds of outliers are protected. Shares of outliers and the exact
rule of allocation could not be read in the paper and are this project's completion.
"""

from typing import Literal

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.solvers.kmeans import kmeans, nearest
from mergequant.solvers.sweep import InverseFactor
from mergequant.solvers.vector_gptq import CodebookSolution, Section, code_columns, find_books

__all__ = ["Allocation", "allocate_channels", "allocate_greedily", "channel_levels", "outlier_mask"]

Allocation = Literal["norms", "greedy"]

# A bit more divides a channel's error by about 4, a bit less multiplies it by 4: what the strong channels gain (3/4 of
# their share) outweighs what the weak ones lose (3 of theirs) where they have 4 times the energy.
SWAP_RATIO = 4.0


def allocate_channels(energy: Tensor, average: float, *, least: int = 2, most: int = 4, swap: float = 0.1) -> Tensor:
    """Bits of every channel by the size of its activations.

    Between two whole widths, the strongest channels get the larger one. At a whole width, a share `swap` of the
    strongest gets one bit more and as many of the weakest one less, unless norms are so flat that this loses.

    Args:
        energy: (width,), sum of squared activations of each channel.
        average: bits per weight, any number from `least` to `most`.
        least, most: ends of the palette of widths.
        swap: share of channels.

    Returns:
        int64 (width,); the mean is `average` to within half a channel.

    Raises:
        UsageError: an average outside the palette.
    """
    _check_average(average, least, most)
    width = energy.shape[0]
    order = torch.argsort(energy, descending=True, stable=True)
    whole = int(average)
    bits = torch.full((width,), whole, dtype=torch.int64, device=energy.device)
    more = round((average - whole) * width)
    if more:
        bits[order[:more]] += 1
        return bits
    count = int(swap * width)
    if count and least < whole < most:
        strong, weak = energy[order[:count]].double().mean(), energy[order[width - count :]].double().mean()
        if bool(strong > SWAP_RATIO * weak):
            bits[order[:count]] += 1
            bits[order[width - count :]] -= 1
    return bits


def allocate_greedily(
    weight: Tensor, energy: Tensor, average: float, *, least: int = 2, most: int = 4, iterations: int = 20
) -> Tensor:
    """Bits of every channel by what they save: energy times the squared error of the column's own levels.

    Bits go one by one to the channel that saves most with the next one (this project's extension). Arguments and result
    as in `allocate_channels`, with the weight (outputs, width).
    """
    _check_average(average, least, most)
    columns = weight.float().t()[..., None]  # (width, outputs, 1)
    mass = torch.ones_like(columns[..., 0])
    errors = []
    for bits in range(least, most + 1):
        book = kmeans(columns, mass, 1 << bits, iterations=iterations, start="quantiles")
        chosen = book.gather(1, nearest(columns, book)[..., None])
        errors.append((columns - chosen).double().square().sum((1, 2)) * energy.double())
    cost = torch.stack(errors, 1)  # (width, widths)
    # A saving is never worth more than the one before it: then the largest savings of all are a valid choice.
    saved = (cost[:, :-1] - cost[:, 1:]).cummin(1).values
    budget = round((average - least) * weight.shape[1])
    granted = torch.zeros_like(saved, dtype=torch.int64).reshape(-1)
    ranked = torch.argsort(saved.t().reshape(-1), descending=True, stable=True)  # equal savings: lower widths first
    granted[ranked[:budget]] = 1
    return least + granted.reshape(saved.shape[1], -1).sum(0)


def outlier_mask(weight: Tensor, energy: Tensor, sensitive: float, active: float) -> Tensor:
    """Values that are kept: the largest ones, and of the rest those with the largest |value| * activation norm.

    Args:
        weight: (outputs, width).
        energy: (width,).
        sensitive, active: shares of all values.

    Returns:
        bool (outputs, width).
    """
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    size = weight.float().abs()
    for score, share in ((size, sensitive), (size * energy.float().sqrt(), active)):
        count = round(share * weight.numel())
        left = torch.where(mask, torch.full_like(mask, -1.0, dtype=torch.float32), score.reshape(-1))
        mask[torch.argsort(left, descending=True, stable=True)[:count]] = True
    return mask.reshape(weight.shape)


def channel_levels(
    weight: Tensor,
    energy: Tensor,
    bits: Tensor,
    kept: Tensor,
    inverse: InverseFactor | None = None,
    *,
    iterations: int = 100,
) -> CodebookSolution:
    """Levels for every column by k-means of what is not kept, columns of a width side by side, and the coded weight.

    Args:
        weight: (outputs, width).
        energy: (width,), of the activations.
        bits: int64 (width,), of every column.
        kept: bool (outputs, width), values that are stored in 16 bits beside the codes.
        inverse: with it, the error of every column is fed back to the others.
        iterations: of k-means.

    Raises:
        UsageError: as `find_books`.
    """
    weight = weight.float()
    if inverse is not None:
        weight = torch.where(inverse.dead, torch.zeros_like(weight), weight)
    order = torch.argsort(bits, descending=True, stable=True)
    widths, counts = bits[order].unique_consecutive(return_counts=True)
    sections = [Section(count, 1, own, 0, count) for own, count in zip(widths.tolist(), counts.tolist())]
    books = find_books(weight, energy, order, sections, iterations=iterations, mask=kept)
    made, _ = code_columns(weight, inverse, order, sections, books, kept)
    return CodebookSolution(made, *((inverse.damping, inverse.attempts) if inverse is not None else ()))


def _check_average(average: float, least: int, most: int) -> None:
    if not 1 <= least <= average <= most:
        raise UsageError(f"an average of {average} bits cannot be met with widths of {least} to {most} bits")
