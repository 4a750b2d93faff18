"""FlatQuant: an affine transform is learned for the input of every linear, cheap because it is a Kronecker product.

"FlatQuant: Flatness Matters for LLM Quantization", arXiv 2410.09426.

Where this differs from the paper and its code: transforms begin as Hadamard-like rotations (`start=random` is the
paper's random orthogonal); a block is trained on the quantized stream, as every block of this package is calibrated
(there: on the float model's); q, k and v share one clip ratio of their input, gate and up another; the transform of
queries and keys, which matters only for a quantized cache, is left out; fewer steps of smaller batches are the default,
so that two CPU cores do.

Measured on `ref` (16 calibration windows of 512 tokens, first 8 windows of the WikiText-2 test text, one seed) with
prefix=bos: increase of the mean NLL 0.044, KL 0.049; `quarot` with prefix=bos and activation_clip=search on the same:
0.048, 0.058. With 128 windows and three seeds: 0.045; `start=random` 0.043, on the other text 0.048 instead of
0.043: noise (docs/results.md). Longer training is not measured.
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Flatten, Round, RoundingName, Step

__all__ = ["flatquant"]

FLOAT_BITS = 16
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.78, "Llama-2-7B W4A4KV4, GPTQ, rows (float 5.47)", "paper"),
    Figure("WikiText-2 perplexity", 5.79, "Llama-2-7B W4A4KV4, RTN, rows (float 5.47)", "paper"),
    Figure("WikiText-2 perplexity", 5.11, "Llama-2-13B W4A4KV4, GPTQ, rows (float 4.88)", "paper"),
    Figure("WikiText-2 perplexity", 3.54, "Llama-2-70B W4A4KV4, GPTQ, rows (float 3.32)", "paper"),
    Figure("WikiText-2 perplexity", 6.90, "Llama-3-8B W4A4KV4, GPTQ, rows (float 6.14)", "paper"),
    Figure("WikiText-2 perplexity", 6.98, "Llama-3-8B W4A4KV4, RTN, rows (float 6.14)", "paper"),
    Figure("zero-shot average of 6 tasks", 67.96, "Llama-2-7B W4A4KV4 (float 69.79)", "paper"),
    Figure("zero-shot average of 6 tasks", 71.23, "Llama-3-8B W4A4KV4 (float 73.23)", "paper"),
)


@register_recipe("flatquant", paper="FlatQuant, arXiv 2410.09426", expected=EXPECTED)
def flatquant(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    start: Literal["hadamard", "random", "identity"] = "hadamard",
    scale: bool = True,
    clip: bool = True,
    rate: float = 5e-3,
    epochs: int = 15,
    chunks: int = 2,
    batch_tokens: int = 1024,
    rounding: RoundingName = "gptq",
    row_search: bool = False,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Learned Kronecker transforms and clipping per site, trained block by block; dynamic scales per token.

    weight_bits, activation_bits: of integers; both are in the loop.
    start: where the transforms begin.
    scale: learn a scale per channel in front of the transform too; norms and up_proj take it up.
    clip: learn clip ratios of weight rows and inputs.
    rate: learning rate of transforms; clip ratios learn ten times as fast.
    epochs, chunks, batch_tokens: passes over how many calibration chunks (of about 4096 tokens), in steps of how many
        tokens (0 = a chunk). The paper's: epochs=15 chunks=64 batch_tokens=8192.
    rounding: gptq, rtn or quantease.
    row_search: search row ranges again when rounding, on top of the learned ones.
    prefix: none, bos, auto (outlier tokens are searched), or token ids: their keys and values are stored and start
        every cache.
    """
    if activation_bits >= FLOAT_BITS:
        raise RecipeError(
            "recipe 'flatquant': the online transform needs integer inputs; weight-only is what awq is for"
        )
    flatten = Flatten(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        start=start,
        scale=scale,
        clip=clip,
        rate=rate,
        clip_rate=10 * rate,
        epochs=epochs,
        chunks=chunks,
        batch_tokens=batch_tokens,
    )
    return (flatten, Round(method=rounding, bits=weight_bits, clip=row_search)), prefix
