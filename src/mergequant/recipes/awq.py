"""AWQ: weight-only integers in groups; columns that meet large inputs are scaled up before they are rounded.

"AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", MLSys 2024, arXiv
2306.00978.

Where this differs from the reference code: codes are symmetric (there: with a zero point), so a 4-bit group of 128
costs 4.25 bits a weight; inputs are calibrated with upstream layers quantized, as everywhere in this package; the clip
search sees all calibration tokens (there: 512); o_proj is scaled under grouped queries too, query heads that share a
value head by one scale.
"""

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import ClipWeights, Round, RoundingName, ScaleChannels, Step

__all__ = ["awq"]

GROUPS = "weight-only, groups of 128, with zero points"
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.60, f"Llama-2-7B W4, {GROUPS} (float 5.47, RTN 5.73)", "paper"),
    Figure("WikiText-2 perplexity", 4.97, f"Llama-2-13B W4, {GROUPS} (float 4.88, RTN 4.98)", "paper"),
    Figure("WikiText-2 perplexity", 3.41, f"Llama-2-70B W4, {GROUPS} (float 3.32, RTN 3.46)", "paper"),
    Figure("WikiText-2 perplexity", 6.24, f"Llama-2-7B W3, {GROUPS} (float 5.47, RTN 6.66)", "paper"),
)
RATIOS = tuple(step / 20 for step in range(20))  # 0 to 0.95; 0 is no scaling at all


@register_recipe("awq", paper="AWQ, arXiv 2306.00978", expected=EXPECTED)
def awq(
    *,
    weight_bits: int = 4,
    group_size: int = 128,
    scale: bool = True,
    clip: bool = True,
    rounding: RoundingName = "rtn",
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: channels scaled by mean|X|^r with the r of least module error, ranges clipped, rounded in groups.

    weight_bits, group_size: where the group size does not divide a width, a smaller one that does is taken, or a scale
        per row; 0 = a scale per row.
    scale: search r per site, in steps of 0.05, by the output of attention or MLP.
    clip: search the range of every row and group by its own part of the output; queries and keys are left alone.
    rounding: rtn as the paper, or gptq or quantease on top.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    steps: list[Step] = []
    if scale:
        steps.append(ScaleChannels(rule="aware", exponents=RATIOS, weight_bits=weight_bits, group_size=group_size))
    if clip:
        steps.append(ClipWeights(weight_bits=weight_bits, group_size=group_size))
    steps.append(Round(method=rounding, bits=weight_bits, group_size=group_size, clip=False, fit_groups=True))
    return tuple(steps), prefix
