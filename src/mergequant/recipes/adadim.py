"""AdaDim: weight-only groups that run along rows or down columns, chosen for each linear.

"Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models", ICLR 2024,
arXiv 2309.15531.

Where this differs from the released code: ranges include 0 for both directions (there, RTN's do not, and a group of one
sign gets a zero point that is clamped); inputs are calibrated with upstream layers quantized, as everywhere in this
package; queries, keys and values are judged at the output of the whole attention, as gate and up at that of the MLP.
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import AdaptiveRound, RoundingName, Step

__all__ = ["adadim"]

EXPECTED = (
    Figure("WikiText-2 perplexity", 9.09, "Llama-2-7B, columns for q, k, v and down (rows everywhere 9.22)", "review"),
    Figure("MMLU", 41.8, "Llama-2-7B W3 g128, RTN-ada (RTN 37.5), read off a chart", "paper"),
    Figure("MMLU", 57.08, "Vicuna-33B W3 g128, GPTQ-ada (GPTQ 55.68)", "paper"),
)


@register_recipe("adadim", paper="AdaDim, arXiv 2309.15531", expected=EXPECTED)
def adadim(
    *,
    weight_bits: int = 3,
    group_size: int = 128,
    rounding: RoundingName = "gptq",
    axis: Literal["adaptive", "row", "column"] = "adaptive",
    judge: Literal["module", "layer"] = "module",
    zeros: bool = True,
    clip: bool = False,
    activation_order: bool = True,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: groups along the rows of a weight or down its columns, whichever costs the module less.

    weight_bits, group_size: where the group size does not divide a width (or a number of outputs), a smaller one that
    does is taken, or one scale for all of it.
    rounding: rtn, gptq, or quantease (GPTQ polished); activation_order, damping: as in GPTQ.
    axis: adaptive, or row (per output channel) or column (per input channel) everywhere.
    judge: module = both forms rounded to nearest, at the module's output, as the paper; layer = each linear's own error
    after the rounding that is stored: never above the better of the two.
    zeros: a zero point for every scale; clip: search ranges of least error.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    step = AdaptiveRound(
        method=rounding,
        bits=weight_bits,
        group_size=group_size,
        fit_groups=True,
        axis=axis,
        judge=judge,
        zeros=zeros,
        clip=clip,
        activation_order=activation_order,
        damping=damping,
        dense=True,
    )
    return (step,), prefix
