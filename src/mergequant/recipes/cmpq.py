"""CMPQ: any average width, by a width for every input channel, levels for every column, and protected outliers.

"Channel-Wise Mixed-Precision Quantization for Large Language Models", arXiv 2410.13056. There is no official code. What
could not be read in the paper is this project's completion: which share of channels moves at a whole average (and that
it stays where norms are flat), the split of the half per cent of outliers, and the score of those by activation.
`allocation=greedy` and `feedback` are extensions.

Levels are stored for every column: 2^width values of 16 bits, which counts on small models (0.25 bits a weight at 3
bits and 512 outputs).
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import RoundChannels, Step

__all__ = ["cmpq"]

EXPECTED = (Figure("C4 perplexity", 7.10, "Llama-2-7B, 4 bits (QuIP 6.69)", "public review of the paper"),)


@register_recipe("cmpq", paper="CMPQ, arXiv 2410.13056", expected=EXPECTED)
def cmpq(
    *,
    average_bits: float = 3.0,
    least: int = 2,
    most: int = 4,
    allocation: Literal["norms", "greedy"] = "norms",
    swap: float = 0.1,
    sensitive: float = 0.0045,
    active: float = 0.0005,
    feedback: bool = False,
    iterations: int = 100,
    damping: float = 0.01,
    activation_order: bool = True,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only, any average width: bits by input channel, k-means levels in every column, two kinds of outliers.

    average_bits: any number from least to most, without levels and outliers (which reports count).
    least, most: widths of channels.
    allocation: norms (stronger channels get more) or greedy (those that save the most error).
    swap: at a whole average, share of channels with a bit more, and with one less; none where norms are flat.
    sensitive, active: shares of values kept in 16 bits: the largest, and the largest times their channel's norm.
    feedback: GPTQ's error feedback; damping, activation_order: of it. iterations: of k-means.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    step = RoundChannels(
        damping=damping,
        activation_order=activation_order,
        iterations=iterations,
        average_bits=average_bits,
        least=least,
        most=most,
        allocation=allocation,
        swap=swap,
        sensitive=sensitive,
        active=active,
        feedback=feedback,
    )
    return (step,), prefix
