"""PowerQuant and NUPES: weights on power grids, sign(c) |c|^(1/a), whose exponent is searched or learned.

"Automorphism Search for Non-Uniform Quantization", ICLR 2023, arXiv 2301.09858; "NUPES: Non-Uniform Post-Training
Quantization via Power Exponent Search", arXiv 2308.05600. Neither has official code, and no table of either could be
read, so no figure is expected.

Where this differs from what is known of the papers: weight-only by default; where inputs are quantized, they are so
uniformly, with weights of exponent 1/2, whose products are an int8 GEMM on squared codes; NUPES learns layer by layer.
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.recipes.recipe import PrefixChoice, register_recipe
from mergequant.steps import PowerRound, RoundingName, SearchExponent, Step, TokenInput

__all__ = ["nupes"]

FLOAT_BITS = 16
PAPERS = "NUPES, arXiv 2308.05600"


@register_recipe(
    "powerquant",
    paper="PowerQuant, arXiv 2301.09858",
    summary="Weight-only: a power grid, its one exponent searched on all weights; without data.",
    defaults={"learn": 0},
)
@register_recipe("nupes", paper=PAPERS)
def nupes(
    *,
    weight_bits: int = 4,
    activation_bits: int = 16,
    group_size: int = 0,
    exponent: float | Literal["network", "layer"] = "network",
    learn: int = 300,
    rounding: RoundingName = "rtn",
    clip: bool = False,
    activation_order: bool = True,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: a power grid whose exponent and codes are learned for the error at each layer's output.

    weight_bits, group_size: where the group size does not divide a width, a smaller one that does is taken, or a scale
    per row; 0 = a scale per row.
    activation_bits: 16 = weight-only; 8 needs exponent=0.5 and at most 4 weight bits: squares are integers.
    exponent: network = one of least weight error for all linears, layer = one for each, or a number that stays.
    learn: gradient steps for each linear, from the searched exponent; 0 = none (PowerQuant).
    rounding: before codes are learned: rtn as the papers; gptq or quantease take the level nearest to each compensated
    column, which costs less time than learning and gives less error.
    clip: search ranges of least error; activation_order, damping: as in GPTQ.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    if activation_bits < FLOAT_BITS and (exponent != 0.5 or weight_bits > 4):
        raise RecipeError(
            f"activation_bits={activation_bits}: integer products need whole weights: exponent=0.5 and at most 4 bits"
        )
    steps: list[Step] = [SearchExponent(weight_bits, group_size)] if exponent == "network" else []
    if activation_bits < FLOAT_BITS:
        steps.append(TokenInput(bits=activation_bits, search=False))
    steps.append(
        PowerRound(
            method=rounding,
            bits=weight_bits,
            group_size=group_size,
            fit_groups=True,
            clip=clip,
            activation_order=activation_order,
            damping=damping,
            dense=activation_bits >= FLOAT_BITS,
            exponent=float(exponent) if not isinstance(exponent, str) else 0.0,
            learn=learn,
        )
    )
    return tuple(steps), prefix
