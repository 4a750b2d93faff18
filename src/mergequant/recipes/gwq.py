"""GWQ: the weights with the largest gradients of the language-model loss are kept, all others rounded in groups.

"GWQ: Gradient-Aware Weight Quantization for Large Language Models", arXiv 2411.00850. No code is published, and only
its abstracts and a summary could be read; what they leave open is chosen here: outliers are 1 % of every matrix; groups
have 128 columns, a scale of 16 bits and a whole zero point, fitted without outliers. Perplexities could not be sourced.
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import OutlierChoice, RoundSparse, Step, WeightGradients

__all__ = ["gwq"]

EXPECTED = (Figure("speed over the float model", 1.2, "inference, setting not stated", "abstract"),)


@register_recipe("gwq", paper="GWQ, arXiv 2411.00850", expected=EXPECTED)
def gwq(
    *,
    weight_bits: int = 3,
    group_size: int = 128,
    tile: int = 0,
    share: float = 0.01,
    samples: int = 1,
    accumulate: Literal["squares", "signed"] = "squares",
    times_weight: bool = False,
    outliers: OutlierChoice = "gradient",
    rounding: Literal["rtn", "gptq"] = "rtn",
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: 1 % of the weights, found by the gradients of one sample, are kept; the others rounded in groups.

    weight_bits, group_size, tile: 3 bits in groups of 128 cost 3.25 and 32 bits for each outlier; groups of 16 with
        tile 16 quantize scales and zeros too (3.63). Where the group size does not divide a width, a smaller one is
        taken.
    share: of the weights of every matrix that are kept.
    samples: calibration windows whose gradients count; 1 as the paper.
    accumulate: squares; signed sums are a control that is worse with many samples.
    times_weight: choose by |gradient * weight|.
    outliers: gradient as the paper; or magnitude, hessian, random or none, for comparison; error as SpQR (with gptq).
    rounding: rtn as the paper, or gptq.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    steps: list[Step] = []
    if outliers == "gradient":
        steps.append(WeightGradients(share, samples, accumulate, times_weight))
    steps.append(
        RoundSparse(
            method=rounding,
            bits=weight_bits,
            group_size=group_size,
            tile=tile,
            whole_zeros=True,
            damping=0.01,
            chosen_by=outliers,
            share=share,
            largest_share=share,
        )
    )
    return tuple(steps), prefix
