"""QuantEase: weight-only integers by cyclic coordinate descent on a layer's output error, outliers apart if asked.

"QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885.

Where this differs from the released code: its GPTQ start descends towards weights that are rounded already, which does
nothing, and its outlier loop never quantizes; here both follow the paper's text.
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Round, Step

__all__ = ["quantease"]

ROWS = "per row, with zero points"
EXPECTED = (
    Figure("WikiText-2 perplexity", 21.30, f"OPT-1.3B W3, {ROWS} (float 14.62)", "repository README"),
    Figure("WikiText-2 perplexity", 15.28, f"OPT-1.3B W4, {ROWS} (float 14.62)", "repository README"),
    Figure("WikiText-2 perplexity", 16.25, f"OPT-1.3B W3 + 1% single outliers, {ROWS}", "repository README"),
    Figure("WikiText-2 perplexity", 18.51, f"OPT-1.3B W3 + 1% of columns, {ROWS}", "repository README"),
    Figure("WikiText-2 perplexity", 8.83, f"Falcon-7B W3, {ROWS} (float 6.59)", "repository README"),
    Figure("WikiText-2 perplexity", 6.92, f"Falcon-7B W4, {ROWS} (float 6.59)", "repository README"),
)


@register_recipe("quantease", paper="QuantEase, arXiv 2309.01885", expected=EXPECTED)
def quantease(
    *,
    weight_bits: int = 3,
    group_size: int = 0,
    zeros: bool = True,
    clip: bool = False,
    start: Literal["float", "rtn", "gptq"] = "float",
    sweeps: int = 30,
    relax: bool = True,
    activation_order: bool = False,
    damping: float = 0.01,
    outliers: float = 0.0,
    whole_columns: bool = False,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: every column in turn takes its best value, the others held, until none has a better one.

    weight_bits, group_size: where the group size does not divide a width, a smaller one that does is taken, or a scale
    per row; 0 = a scale per row. Grids are those of the original weights throughout.
    zeros: a zero point for every scale; clip: search ranges of least error (the paper does not).
    start: float as the paper, rtn, or gptq (damping: its own), which descent then polishes.
    sweeps: passes over all columns; relax: every third one does not round, the last ones do.
    activation_order: columns by falling energy of their input.
    outliers: share of the weights (the paper's 1%: 0.01) that stay in 16 bits beside the codes, chosen and moved by the
    descent itself; whole_columns: of the columns instead, the same for all rows.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    step = Round(
        method="quantease",
        bits=weight_bits,
        group_size=group_size,
        fit_groups=True,
        zeros=zeros,
        clip=clip,
        start=start,
        sweeps=sweeps,
        relax=relax,
        activation_order=activation_order,
        damping=damping,
        dense=True,
        outliers=outliers,
        whole_columns=whole_columns,
    )
    return (step,), prefix
