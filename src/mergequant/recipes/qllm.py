"""QLLM: strong channels are taken apart, like ones put together, and a low-rank correction repairs what is left.

"QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language Models", ICLR 2024, arXiv 2310.08041.

Where this differs from the reference code: codes are symmetric (there: with a zero point, for weights and tokens); the
products inside attention stay in floating point (there: queries, keys and values are quantized); blocks are corrected
one by one, each against its own float output for the inputs that it gets (there: four together, against the float
model's; with single blocks the paper reports 11.21 in the place of 9.65, Llama-1-7B W4A4); the learning rate falls by a
cosine (there: linearly); the final norm gets no bias. A threshold is judged behind o_proj and down_proj, not before
them; at most 24 are tried (there: all that differ, `tried=0`). Even and odd channels are told apart before strong ones
are split. The correction learns from 8 x 4096 tokens (there: from 128 x 2048, `chunks=64`).

On `ref` at W4A4, with far less text than the default takes: D 0.401 without and 0.381 with the correction, where
rounding alone gives 0.470 and SmoothQuant, rounded alike, 0.413 (`docs/log.md`; an order, no result).

At run time, what remains is a gather, and a sum for the slots that several channels share: the divisors of copies and
means are in the norm's gain, or in up_proj's rows.
"""

from typing import Literal

from mergequant.models.roles import SiteKind
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import LowRank, Reassemble, Round, RoundingName, Step, TokenInput
from mergequant.transforms import Distance

__all__ = ["qllm"]

W4A4 = "W4A4, asymmetric, scales per row and per token, attention's operands quantized"
EXPECTED = (
    Figure("WikiText-2 perplexity", 9.65, f"Llama-1-7B, {W4A4} (float 5.68, SmoothQuant 52.85)", "paper"),
    Figure("WikiText-2 perplexity", 8.41, f"Llama-1-13B, {W4A4} (float 5.09, SmoothQuant 79.35)", "paper"),
    Figure("WikiText-2 perplexity", 11.75, f"Llama-2-7B, {W4A4} (float 5.47, SmoothQuant 101.77)", "paper"),
    Figure("WikiText-2 perplexity", 9.09, f"Llama-2-13B, {W4A4} (float 4.88, SmoothQuant 29.82)", "paper"),
    Figure("WikiText-2 perplexity", 7.00, f"Llama-2-70B, {W4A4} (float 3.32, SmoothQuant 26.01)", "paper"),
    Figure("WikiText-2 perplexity", 11.21, f"Llama-1-7B, {W4A4}, corrected block by block", "paper, ablation"),
    Figure("WikiText-2 perplexity", 5.89, "Llama-1-7B, W6A6 (float 5.68)", "paper"),
)
APART: tuple[SiteKind, ...] = ("norm", "stream", "mlp_output")
OTHER: tuple[SiteKind, ...] = ("attention_output",)
SEQUENCE = 2048  # tokens of one step of the optimizer
Correction = Literal["apart", "merged", "inputs", "none"]


@register_recipe("qllm", paper="QLLM, arXiv 2310.08041", expected=EXPECTED)
def qllm(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    expansion: float | Literal["search"] = "search",
    most: float = 0.2,
    tried: int = 24,
    merge: bool = True,
    distance: Distance = "output",
    correction: Correction = "apart",
    rank: int = 4,
    epochs: int = 10,
    learning_rate: float = 5e-4,
    chunks: int = 8,
    rounding: RoundingName = "rtn",
    clip: bool = False,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Channels reassembled at constant width, a low-rank correction merged into the weights, then integers.

    weight_bits, activation_bits: 4 and 4, 6 and 6, or 8 and 8; tokens get their scales at run time.
    expansion: share of slots that strong channels get beside their own; search = per site, by the module's output.
    most: of the search, at most this share of the channels. `tried`: at most so many thresholds; 0 = all that differ.
    merge: save as many slots by merging like channels; else the width grows by the expansion.
    distance: what merging goes by: output = the paper's equation; sums = what its code computes.
    correction: what the loop sees of the weights while it learns: apart = rounded ones with the correction beside them
        (the paper's way), merged = the rounded sum, inputs = float ones; none = no correction.
    rank, epochs, learning_rate: of the correction.
    chunks: of 4096 tokens that the correction learns from, if there are as many; the paper takes 64.
    rounding: rtn as the paper, gptq, or quantease.
    clip: search the ranges of weight rows.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    share = 0.0 if expansion == "search" else float(expansion)
    steps: list[Step] = [TokenInput(OTHER, activation_bits, search=False)]
    if expansion == 0:
        steps.append(TokenInput(APART, activation_bits, search=False))
    else:
        steps.append(Reassemble(APART, activation_bits, weight_bits, most, share, merge, distance, tried))
    if correction != "none":
        in_loop, apart = correction != "inputs", correction == "apart"
        steps.append(LowRank(rank, learning_rate, epochs, chunks, in_loop, weight_bits, apart, True, SEQUENCE))
    steps.append(Round(method=rounding, bits=weight_bits, clip=clip))
    return tuple(steps), prefix
