"""SpinQuant: QuaRot with rotations that are learned instead of drawn.

"SpinQuant: LLM Quantization with Learned Rotations", arXiv 2405.16406. R1 and R2 begin as randomised Hadamard
rotations and follow the gradient of the rounded network's loss on the orthogonal group.

Where this differs from the paper and its code: inputs are symmetric with a clip ratio (there: asymmetric, unclipped),
so that `quarot` differs in nothing but what is learned; a run's own calibration windows are learned from, fewer
tokens a step; the rotation of queries and keys (R3), which matters only for a quantized cache, is an option
(`rotate_keys`); a prefix and a quantized cache are not there while the rotations are learned. The whole float model is
in memory meanwhile: meant for small ones.
What learning brings over `quarot` is yet to be measured with several seeds (`docs/log.md` has a first trial).
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import LearnRotations, Rotate, RotateKeys, Round, RoundingName, Step, TokenInput

__all__ = ["spinquant"]

FLOAT_BITS = 16
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.9, "Llama-2-7B W4A4KV4, GPTQ (float 5.5)", "repository"),
    Figure("WikiText-2 perplexity", 5.3, "Llama-2-13B W4A4KV4, GPTQ (float 5.0)", "repository"),
    Figure("WikiText-2 perplexity", 3.8, "Llama-2-70B W4A4KV4, GPTQ (float 3.3)", "repository"),
    Figure("WikiText-2 perplexity", 7.3, "Llama-3-8B W4A4KV4, GPTQ (float 6.1)", "repository"),
    Figure("zero-shot average", 64.0, "Llama-2-7B W4A4KV4, GPTQ (float 66.9)", "repository"),
)


@register_recipe("spinquant", paper="SpinQuant, arXiv 2405.16406", expected=EXPECTED)
def spinquant(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    steps: int = 100,
    rate: float = 1.5,
    batch_tokens: int = 1024,
    activation_clip: Literal["fixed", "search"] = "fixed",
    clip_ratio: float = 0.9,
    rounding: RoundingName = "gptq",
    weight_clip: bool = True,
    activation_order: bool = False,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
    rotate_keys: bool = False,
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Residual stream and value heads rotated as learned, input of down_proj by a Hadamard; dynamic scales per token.

    weight_bits; activation_bits, which are in the loop.
    steps, rate, batch_tokens: of Cayley SGD. The paper's: steps=100 rate=1.5 batch_tokens=16384.
    activation_clip: fixed = every token's grid covers `clip_ratio` of its largest magnitude; search = a ratio per site,
        of least output error (learning goes on with `clip_ratio`).
    rounding: gptq, rtn or quantease; weight_clip: search row ranges; activation_order, damping: as in GPTQ.
    prefix: none, bos, auto (outlier tokens are searched), or token ids: their keys and values are stored and start
        every cache.
    rotate_keys: a quantized cache (8 or 4 bits) keeps the keys of each head times a Hadamard rotation (R3), in
        evaluation and in transformers' generation; the fast loop then takes a cache of 16 bits only. Weights and
        activations stay as they are.
    """
    if activation_bits >= FLOAT_BITS:
        raise RecipeError(
            "recipe 'spinquant': rotations are learned for integer inputs; weight-only is what quarot serves"
        )
    learn = LearnRotations(
        bits=activation_bits, clip_ratio=clip_ratio, steps=steps, rate=rate, batch_tokens=batch_tokens
    )
    acting: tuple[Step, ...] = (
        learn,
        Rotate(("mlp_output",)),
        TokenInput(bits=activation_bits, search=activation_clip == "search", clip_ratio=clip_ratio),
        Round(method=rounding, bits=weight_bits, clip=weight_clip, damping=damping, activation_order=activation_order),
    )
    return (*acting, RotateKeys()) if rotate_keys else acting, prefix
