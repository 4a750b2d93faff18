"""Baselines: round-to-nearest and GPTQ, weight-only or with a dynamic scale per token."""

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Round, Step, TokenInput

__all__ = ["gptq", "rtn"]

FLOAT_BITS = 16


@register_recipe("rtn", paper="round to nearest")
def rtn(
    *, weight_bits: int = 4, activation_bits: int = 4, group_size: int = 0, clip: bool = False, zeros: bool = False
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Round to nearest; activations with a scale per token.

    weight_bits; activation_bits (16 = weight-only); group_size (0 = a scale per row; groups are weight-only);
    clip: search row ranges of least error; zeros: an integer zero point per row or group, weight-only.
    """
    steps: list[Step] = []
    if activation_bits < FLOAT_BITS:
        steps.append(TokenInput(bits=activation_bits, search=False))
    steps.append(Round(method="rtn", bits=weight_bits, group_size=group_size, clip=clip, zeros=zeros))
    return tuple(steps), "none"


@register_recipe(
    "gptq",
    paper="GPTQ, arXiv 2210.17323",
    expected=(
        Figure("WikiText-2 perplexity", 6.09, "LLaMA-7B W4, rows, act-order (float 5.68)", "repository README"),
        Figure("WikiText-2 perplexity", 8.07, "LLaMA-7B W3, rows, act-order (float 5.68)", "repository README"),
    ),
)
def gptq(
    *,
    weight_bits: int = 4,
    activation_bits: int = 16,
    group_size: int = 0,
    clip: bool = True,
    activation_order: bool = True,
    damping: float = 0.01,
    activation_clip: bool = False,
    zeros: bool = False,
    static_groups: bool = True,
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """GPTQ; weight-only by default.

    weight_bits; activation_bits (16 = weight-only, else a dynamic scale per token); group_size (0 = a scale per row);
    clip: search row ranges; activation_order; damping; activation_clip: search the per-token clip ratio;
    zeros: an integer zero point per row or group, weight-only; static_groups: scales of groups from the weights as they
    were (false: when their turn comes, from compensated weights, with activation_order=false).
    """
    steps: list[Step] = []
    if activation_bits < FLOAT_BITS:
        steps.append(TokenInput(bits=activation_bits, search=activation_clip))
    steps.append(
        Round(
            method="gptq",
            bits=weight_bits,
            group_size=group_size,
            clip=clip,
            damping=damping,
            activation_order=activation_order,
            zeros=zeros,
            static_groups=static_groups,
        )
    )
    return tuple(steps), "none"
