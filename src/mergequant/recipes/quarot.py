"""QuaRot: outliers vanish when the residual stream is rotated.

"QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, section 4. R1 and the head-wise rotation of
values are fused into the weights; the input of down_proj is rotated online.

Left out: the online rotation of queries and keys (R3), which matters only for a quantized cache. Different from the
paper: it also mixes the heads at o_proj online, which is `heads=online` here (one full rotation, nothing fused);
GPTQ's Hessian is that of quantized inputs; a run's seed draws the signs.

Measured on `ref` (64 calibration windows of 512 tokens, first 24 windows of the WikiText-2 test text, one seed):
increase of the mean NLL 0.069; with prefix=bos and activation_clip=search 0.057.
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Rotate, RotateResidual, Round, Step, TokenInput

__all__ = ["quarot"]

FLOAT_BITS = 16


@register_recipe(
    "quarot",
    paper="QuaRot, arXiv 2404.00456",
    expected=(
        Figure("WikiText-2 perplexity", 6.10, "Llama-2-7B W4A4KV4, GPTQ, rows (float 5.47)", "paper, main table"),
        Figure("WikiText-2 perplexity", 5.40, "Llama-2-13B W4A4KV4, GPTQ, rows (float 4.88)", "paper, main table"),
        Figure("WikiText-2 perplexity", 3.79, "Llama-2-70B W4A4KV4, GPTQ, rows (float 3.32)", "paper, main table"),
        Figure("WikiText-2 perplexity", 8.16, "Llama-3-8B W4A4KV4, GPTQ, rows (float 6.14)", "paper"),
        Figure("zero-shot average of 6 tasks", 65.64, "Llama-2-7B W4A4KV4 (float 69.82)", "paper"),
    ),
)
def quarot(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    heads: Literal["fused", "online", "none"] = "fused",
    activation_clip: Literal["fixed", "search"] = "fixed",
    clip_ratio: float = 0.9,
    rounding: Literal["gptq", "rtn"] = "gptq",
    weight_clip: bool = True,
    activation_order: bool = False,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Residual stream rotated by a randomised Hadamard, dynamic scales per token.

    weight_bits; activation_bits (16 = weight-only).
    heads: fused = values of each head are rotated, in the weights of v_proj and o_proj; online = the whole input of
        o_proj is rotated at run time, which mixes heads too; none.
    activation_clip: fixed = every token's grid covers `clip_ratio` of its largest magnitude; search = a ratio per site,
        of least output error.
    rounding: gptq or rtn; weight_clip: search row ranges; activation_order, damping: as in GPTQ.
    prefix: none, bos, auto (outlier tokens are searched), or token ids: their keys and values are stored and start
        every cache.
    """
    if not 0 < clip_ratio <= 1:
        raise RecipeError(f"recipe 'quarot': clip_ratio {clip_ratio} is outside (0, 1]")
    steps: list[Step] = [
        RotateResidual(heads=heads == "fused"),
        Rotate(("attention_output", "mlp_output") if heads == "online" else ("mlp_output",)),
    ]
    if activation_bits < FLOAT_BITS:
        steps.append(TokenInput(bits=activation_bits, search=activation_clip == "search", clip_ratio=clip_ratio))
    steps.append(
        Round(
            method=rounding,
            bits=weight_bits,
            clip=weight_clip,
            damping=damping,
            activation_order=activation_order,
        )
    )
    return tuple(steps), prefix
