"""Outlier Suppression+: channels are centred, and those above one searched threshold are scaled down to it.

"Outlier Suppression+: Accurate quantization of large language models by equivalent and effective shifting and scaling",
EMNLP 2023, arXiv 2304.09145.

The threshold is judged at the output of the module behind a site, with weights and inputs rounded as they will be. Both
changes migrate into the norm and its consumers (down_proj: into the rows of up_proj), so nothing of them is left.

Where this differs from the reference code: grids are symmetric (there, from 6 bits down: with zero points); a module
ends where the next norm begins, so attention is judged behind o_proj and the MLP behind its last layer (there: before
them); all calibration windows decide the shift, and about 4096 tokens the threshold; thresholds are even shares of the
largest magnitude (there: about 100 or more); what attention multiplies is left in floating point. BERT's token-wise
clipping is left out. A post-norm model (BERT) keeps shift and scale at the inputs of the linears: a multiplication and
an addition for an element, as the paper has it at its residual connection.

Measured on `ref` (16 calibration windows of 512 tokens, their 2 held-out windows, one seed): increase of the mean NLL
at W6A6 0.0178, SmoothQuant with alpha 0.85 0.0236; at W4A4 with GPTQ and searched rows 0.245 and 0.263.
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.models.roles import SiteKind
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import ALL_SITES, Round, RoundingName, ScaleChannels, ShiftChannels, Step, TensorInput, TokenInput

__all__ = ["outlier_suppression_plus"]

LLAMA = "per token, RTN, down_proj left in float"
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.76, f"LLaMA-7B W6A6 {LLAMA} (float 5.68, SmoothQuant 5.85)", "paper"),
    Figure("WikiText-2 perplexity", 5.22, f"LLaMA-13B W6A6 {LLAMA} (float 5.09, SmoothQuant 5.25)", "paper"),
    Figure("WikiText-2 perplexity", 14.17, f"LLaMA-7B W4A4 {LLAMA} (float 5.68, SmoothQuant 16.87)", "paper"),
    Figure("WikiText-2 perplexity", 40.32, "LLaMA-7B W4A4, all layers (float 5.68)", "QLLM, arXiv 2310.08041"),
    Figure("PIQA", 77.5, "OPT-66B W6A6, one step per tensor (float 78.7, SmoothQuant 52.0)", "paper"),
    Figure("WinoGrande", 69.4, "OPT-66B W6A6, one step per tensor (float 68.9, SmoothQuant 52.1)", "paper"),
    Figure("GLUE average", 82.8, "BERT-base W6A6 (float 83.8)", "paper"),
    Figure("GLUE average", 78.2, "BERT-base W4A4 (float 83.8)", "paper"),
)
FED: tuple[SiteKind, ...] = ("norm", "stream", "mlp_output")
LEAST = 0.01  # share of the largest magnitude that the smallest of the logarithmic thresholds is


@register_recipe("outlier-suppression-plus", paper="Outlier Suppression+, arXiv 2304.09145", expected=EXPECTED)
def outlier_suppression_plus(
    *,
    weight_bits: int = 6,
    activation_bits: int = 6,
    inputs: Literal["token", "tensor"] = "token",
    shift: Literal["biased", "all", "none"] = "biased",
    thresholds: int = 20,
    spacing: Literal["even", "log"] = "even",
    scale_all: bool = False,
    input_clip: bool = False,
    rounding: RoundingName = "rtn",
    clip: bool = False,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Channels centred, those above a searched threshold scaled down to it, then integers for weights and activations.

    weight_bits, activation_bits: the paper's 6 and 6; 8 and 8, 4 and 4.
    inputs: token = a dynamic scale per token (the paper's choice for Llama); tensor = one static step (OPT).
    shift: biased = norms that have a bias (LayerNorm, as the paper); all = RMSNorms get a bias, as in OutlierTune;
        none.
    thresholds: how many are tried per site, from the largest magnitude (no scaling at all) down; 0 = do not scale.
    spacing: even, as the paper; log = down to a hundredth of the largest magnitude.
    scale_all: also scale the input of o_proj, through v_proj (an extension).
    input_clip: search the clip ratio of tokens, or the range of the static step; else the largest magnitude.
    rounding: rtn as the paper, gptq, or quantease.
    clip: search the ranges of weight rows.
    prefix: none, bos, auto, or token ids whose keys and values start every cache; helps static steps.
    """
    if thresholds < 0:
        raise RecipeError(f"recipe 'outlier-suppression-plus': thresholds {thresholds} must not be negative")
    steps: list[Step] = []
    if shift != "none":
        steps.append(ShiftChannels(norms=shift))
    if thresholds:
        shares = tuple(
            1 - i / thresholds if spacing == "even" else LEAST ** (i / max(thresholds - 1, 1))
            for i in range(thresholds)
        )
        steps.append(
            ScaleChannels(
                ALL_SITES if scale_all else FED,
                "threshold",
                shares,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                inputs=inputs,
            )
        )
    if inputs == "token":
        steps.append(TokenInput(bits=activation_bits, search=input_clip))
    else:
        steps.append(TensorInput(bits=activation_bits, steps=TensorInput.steps if input_clip else 1))
    steps.append(Round(method=rounding, bits=weight_bits, clip=clip))
    return tuple(steps), prefix
