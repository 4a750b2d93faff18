"""SmoothQuant: part of the activations' outliers moves into the weights, by a scale per channel; the W8A8 baseline.

"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023, arXiv 2211.10438.

Where this differs from the reference code: inputs are calibrated with upstream layers quantized, as everywhere in this
package (there: the float model); the products inside attention stay in floating point; linears no norm feeds can be
smoothed too (`smooth_all`, an extension).
"""

from typing import Literal

from mergequant.models.roles import SiteKind
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import ALL_SITES, Round, RoundingName, ScaleChannels, Step, TensorInput, TokenInput

__all__ = ["smoothquant"]

ROWS_AND_TOKENS = "W8A8, scales per row and per token"
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.515, f"Llama-2-7B, {ROWS_AND_TOKENS}, alpha 0.85 (float 5.474)", "repository"),
    Figure("WikiText-2 perplexity", 6.258, f"Llama-3-8B, {ROWS_AND_TOKENS}, alpha 0.85 (float 6.138)", "repository"),
    Figure("WikiText-2 perplexity", 5.277, f"Mistral-7B, {ROWS_AND_TOKENS}, alpha 0.8 (float 5.253)", "repository"),
    Figure("WikiText perplexity", 11.11, "OPT-175B, W8A8 O1 (float 10.99)", "paper"),
    Figure("WikiText-2 perplexity", 83.12, "Llama-2-7B W4A4, RTN (float 5.47)", "QuaRot, arXiv 2404.00456"),
)
NORM: tuple[SiteKind, ...] = ("norm", "stream")
ALPHAS = tuple(step / 20 for step in range(6, 20))  # 0.3 to 0.95


@register_recipe("smoothquant", paper="SmoothQuant, arXiv 2211.10438", expected=EXPECTED)
def smoothquant(
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    alpha: float | Literal["search"] = 0.5,
    smooth_all: bool = False,
    inputs: Literal["token", "tensor"] = "token",
    input_clip: bool = False,
    rounding: RoundingName = "rtn",
    clip: bool = False,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Channels scaled by max|X|^alpha / max|W|^(1 - alpha) behind norms, then integers for weights and activations.

    Where norms come last (BERT), the residual connection reads what a scale would change: there it stays in front of
    the linears, one multiplication for every element.

    weight_bits, activation_bits: the paper's 8 and 8; 4 and 4 are what later papers compare with.
    alpha: share of the difficulty that moves into the weights. The paper's 0.5 was chosen for OPT and BLOOM; its
        repository takes 0.85 for Llama and 0.8 for Mistral. search = per site, by the output of attention or MLP.
    smooth_all: also scale the inputs of o_proj and down_proj, through v_proj and up_proj, where that is proven exact.
    inputs: token = a dynamic scale per token (the paper's O1); tensor = one static step (O3).
    input_clip: search the clip ratio of tokens, or the range of the static step; else the largest magnitude.
    rounding: rtn as the paper, gptq, or quantease.
    clip: search the ranges of weight rows.
    prefix: none, bos, auto, or token ids whose keys and values start every cache; helps static steps.
    """
    sites = ALL_SITES if smooth_all else NORM
    exponents = ALPHAS if alpha == "search" else (float(alpha),)
    steps: list[Step] = [
        ScaleChannels(
            sites, "smooth", exponents, weight_bits=weight_bits, activation_bits=activation_bits, inputs=inputs
        )
    ]
    if inputs == "token":
        steps.append(TokenInput(bits=activation_bits, search=input_clip))
    else:
        steps.append(TensorInput(bits=activation_bits, steps=TensorInput.steps if input_clip else 1))
    steps.append(Round(method=rounding, bits=weight_bits, clip=clip))
    return tuple(steps), prefix
