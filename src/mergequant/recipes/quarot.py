"""QuaRot: outliers vanish when the residual stream is rotated.

"QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, section 4. R1 and the head-wise rotation of
values are fused into the weights; heads are mixed online in front of o_proj, and the input of down_proj is rotated
online.

The rotation of queries and keys (R3) is a property of the quantized cache alone: an option, `rotate_keys`, which the
fast loop's kernels do not know. Different from the paper: blocks are calibrated on what quantized blocks in front give,
activations included; a run's seed draws the signs; a quantized cache has static steps per channel.
Better than the paper's way, as options: `hessian=quantized`, `activation_clip=search`, `prefix=bos`.

Measured on `ref` (64 calibration windows of 512 tokens, first 24 windows of the WikiText-2 test text, one seed) with
heads=fused and hessian=quantized: increase of the mean NLL 0.069; with prefix=bos and activation_clip=search too 0.057.
What the options bring over the paper's way with three seeds stands in docs/results.md.
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import MixHeads, Rotate, RotateKeys, RotateResidual, Round, RoundingName, Step, TokenInput

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
    heads: Literal["mixed", "fused", "online", "none"] = "mixed",
    activation_clip: Literal["fixed", "search"] = "fixed",
    clip_ratio: float = 0.9,
    rounding: RoundingName = "gptq",
    hessian: Literal["float", "quantized"] = "float",
    weight_clip: bool = True,
    activation_order: bool = False,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
    rotate_keys: bool = False,
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Residual stream rotated by a randomised Hadamard, dynamic scales per token.

    weight_bits; activation_bits (16 = weight-only, where heads are not mixed).
    heads: mixed = values of each head are rotated in the weights of v_proj and o_proj, and heads are mixed online in
        front of o_proj, as in the paper; fused = only the former, which costs nothing at run time; online = the whole
        input of o_proj is rotated online; none.
    activation_clip: fixed = every token's grid covers `clip_ratio` of its largest magnitude; search = a ratio per site,
        of least output error.
    rounding: gptq, rtn or quantease; hessian: theirs, of inputs before (float, as the paper) or after they are rounded
        (quantized, better); weight_clip: search row ranges; activation_order, damping: as in GPTQ.
    prefix: none, bos, auto (outlier tokens are searched), or token ids: their keys and values are stored and start
        every cache.
    rotate_keys: a quantized cache (8 or 4 bits) keeps the keys of each head times a Hadamard rotation (R3), in
        evaluation and in transformers' generation; the fast loop then takes a cache of 16 bits only. Weights and
        activations stay as they are.
    """
    if not 0 < clip_ratio <= 1:
        raise RecipeError(f"recipe 'quarot': clip_ratio {clip_ratio} is outside (0, 1]")
    integers = activation_bits < FLOAT_BITS
    steps: list[Step] = [RotateResidual(heads=heads in ("mixed", "fused"))]
    if heads == "mixed" and integers:
        steps.append(MixHeads())
    steps.append(Rotate(("attention_output", "mlp_output") if heads == "online" else ("mlp_output",)))
    if integers:
        steps.append(TokenInput(bits=activation_bits, search=activation_clip == "search", clip_ratio=clip_ratio))
    steps.append(
        Round(
            method=rounding,
            bits=weight_bits,
            clip=weight_clip,
            damping=damping,
            activation_order=activation_order,
            hessian=hessian,
        )
    )
    if rotate_keys:
        steps.append(RotateKeys())
    return tuple(steps), prefix
