"""SpQR: tiny groups whose scales and zero points are quantized themselves, and a few weights that are kept beside them.

"SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", ICLR 2024, arXiv 2306.03078.

Where this differs from the reference code: a kept weight is stored as what is missing to what its place decodes to
(the released kernel adds the weight itself, though its place decodes to something else than 0); the threshold is raised
where more than `largest_share` of a layer's weights would be kept, as the paper tunes it by search; a group without any
spread takes a scale like its neighbours' instead of that of [-1, 1]; rows that fill no tile of 16 make a smaller one.
"""

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import OutlierChoice, RoundSparse, Step

__all__ = ["spqr"]

TABLE = "published note that quotes the paper's table"
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.87, "LLaMA-7B, 3.94 bits (float 5.68, GPTQ 4 bits 6.13)", TABLE),
    Figure("WikiText-2 perplexity", 5.73, "LLaMA-7B, 4.63 bits (float 5.68)", TABLE),
    Figure("WikiText-2 perplexity", 3.74, "LLaMA-65B, 3.63 bits, no outliers (float 3.53, GPTQ 4 bits 3.83)", TABLE),
    Figure("decoded tokens per second", 57.0, "LLaMA-7B, A100, batch 1 (float 47)", TABLE),
)


@register_recipe("spqr", paper="SpQR, arXiv 2306.03078", expected=EXPECTED)
def spqr(
    *,
    weight_bits: int = 3,
    group_size: int = 16,
    tile: int = 16,
    statistic_bits: int = 3,
    threshold: float = 0.2,
    largest_share: float = 0.01,
    leave_one_out: bool = True,
    activation_order: bool = True,
    damping: float = 1.0,
    outliers: OutlierChoice = "error",
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: tiny groups with quantized scales and zeros, outliers by sensitivity, GPTQ in activation order.

    weight_bits: 3 is stored in 3.63 bits and 32 for each outlier, 4 in 4.63 (near-lossless).
    group_size, tile, statistic_bits: columns of a group; rows that share grids of scales and zeros, of so many bits
        (tile 0 = scales and zeros in 16 bits). Where the group size does not divide a width, a smaller one is taken.
    threshold, largest_share: a weight is kept if its error weighs more than this; raised where too many would be.
    leave_one_out: groups are fitted without the weights that spoil them; off = the paper's simplified outliers.
    activation_order: of columns and so of groups, as published; off = the natural order, and none is stored.
    damping: as published for LLaMA, for robustness; 0.01 is more accurate where calibration data are ample.
    outliers: error as the paper; or magnitude, hessian, random or none, for comparison.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    rounding = RoundSparse(
        bits=weight_bits,
        group_size=group_size,
        tile=tile,
        statistic_bits=statistic_bits,
        threshold=threshold,
        largest_share=largest_share,
        leave_one_out=leave_one_out,
        activation_order=activation_order,
        damping=damping,
        chosen_by=outliers,
        share=largest_share,
    )
    return (rounding,), prefix
