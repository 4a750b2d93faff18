"""HQQ: weight-only groups whose zero points leave few large errors; from the weights alone, in seconds.

"Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023 (mobiusml.github.io/hqq_blog), as
publicly described. Calibration text serves the reported errors and the steps of a quantized cache, not the weights.

Where this differs from the released code: every group keeps the best zero point it has met (there: a tensor stops when
its mean error rises), scales are float32 (there: float16), zero points float16 and not rounded at 4 bits.
"""

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import RoundHalfQuadratic, Step

__all__ = ["hqq"]

EXPECTED = (
    Figure("minutes to quantize, at most", 5, "Llama-2-70B, one GPU (over 50x faster than GPTQ)", "description"),
)


@register_recipe("hqq", paper="HQQ, Mobius Labs 2023", expected=EXPECTED)
def hqq(
    *,
    weight_bits: int = 4,
    group_size: int = 64,
    norm: float = 0.7,
    penalty: float = 10.0,
    growth: float = 1.01,
    iterations: int = 20,
    scales: bool = False,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only, no data: nearest codes, zero points by half-quadratic splitting of a sum of |error|^norm.

    weight_bits, group_size: where the group size does not divide a width, a smaller one that does is taken, or a scale
        per row; 0 = a scale per row.
    norm, penalty, growth, iterations: of the splitting; 0 iterations = zero points of smallest and largest weight.
    scales: fit scales to the codes, too: at 2 bits much less error (the description leaves them alone).
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    step = RoundHalfQuadratic(
        bits=weight_bits,
        group_size=group_size,
        fit_groups=True,
        dense=True,
        norm=norm,
        penalty=penalty,
        growth=growth,
        iterations=iterations,
        fit_scales=scales,
    )
    return (step,), prefix
