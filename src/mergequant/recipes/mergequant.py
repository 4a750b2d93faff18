"""MergeQuant: static per-channel W4A4 whose quantization steps cost nothing at run time.

"MergeQuant: Accurate 4-bit Static Quantization of Large Language Models by Channel-wise Calibration", arXiv 2503.07654.
The body of the paper was not available to this project; what the abstract leaves open is a parameter here, and
`docs/results.md` has a row for each.

Norm -> linear sites: ranges per channel; strong channels split; ranges clipped by the joint loss; the step migrates
into the norm's multiplier and the weights' columns; weak channels dropped (or the width padded); least squares; GPTQ on
the codes. Inputs of o_proj and down_proj, which no norm makes, are a parameter of their own (`other`).

`flatquant` is ahead of `mergequant-plus` on the reference models (D 0.045 on both, against 0.051 and 0.056). That is
its dynamic scale at o/d: with one there (`other=hadamard`) `mergequant-plus` has 0.048 and 0.045, a KL of 0.047 and
0.044 against 0.048 and 0.044 (three seeds of most, docs/results.md). Fully static stays the default: it needs no search
at run time. `fine_tune` trains the steps and a scale in front of the rotation: block 1 of `ref` loses 0.0288 instead of
0.0303, the whole model 0.0533 against 0.0508 and on the other text 0.0492 against 0.0529: noise; off.
"""

from typing import Any, Literal

from mergequant.errors import RecipeError
from mergequant.models.roles import SiteKind
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import (
    Clip,
    Compensate,
    LowRank,
    Prune,
    Ranges,
    Rotate,
    Round,
    Split,
    Step,
    TensorInput,
    TokenInput,
    TuneBlock,
)

__all__ = ["mergequant"]

PAPER = "MergeQuant, arXiv 2503.07654"
EXPECTED = (
    Figure("zero-shot average below FP16, points", 1.3, "Llama-2-70B, static W4A4", "abstract"),
    Figure("prefill speed-up over FP16", 2.72, "Llama-2-7B, RTX 3090", "abstract"),
    Figure("decode speed-up over FP16", 1.77, "Llama-2-7B, RTX 3090", "abstract"),
    Figure("end-to-end speed-up over FP16", 2.06, "Llama-2-7B, RTX 3090", "abstract"),
)
Width = Literal["prune", "pad", "keep"]
Clipping = Literal["joint", "activation", "none"]
Compensation = Literal["least_squares", "low_rank", "none"]
Rounding = Literal["gptq", "rtn", "quantease"]
Other = Literal["dynamic", "static", "hadamard", "hadamard-static"]

NORM: tuple[SiteKind, ...] = ("norm", "stream")
OTHER: tuple[SiteKind, ...] = ("attention_output", "mlp_output")
# The extensions beyond the paper. With `other=static other_bits=8` no Hadamard and no dynamic op is left.
PLUS: dict[str, Any] = {
    "split": 0.05,
    "strength": "column",
    "stagger": True,
    "width": "pad",
    "other": "hadamard-static",
    "prefix": "bos",
}
AUTO_BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1)


@register_recipe("mergequant", paper=PAPER, expected=EXPECTED)
@register_recipe(
    "mergequant-plus",
    paper=f"{PAPER}, with this project's extensions",
    summary="Fully static W4A4: staggered copies, padding, online Hadamard with static steps, a prefix.",
    defaults=PLUS,
)
@register_recipe(
    "mergequant-w4a8",
    paper=f"{PAPER}, with this project's extensions, 8-bit activations",
    summary="Fully static W4A8, the quality default.",
    defaults={**PLUS, "activation_bits": 8, "other_bits": 8, "compensation": "none"},
)
def mergequant(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    quantile: float = 1.0,
    split: float | Literal["auto"] = "auto",
    strength: Literal["step", "column"] = "step",
    stagger: bool = False,
    width: Width = "prune",
    tile: int = 64,
    clip: Clipping = "joint",
    compensation: Compensation = "least_squares",
    ridge: float = 0.1,
    rounding: Rounding = "gptq",
    other: Other = "dynamic",
    other_bits: int = 4,
    other_split: float = 0.0,
    fine_tune: int = 0,
    prefix: str | tuple[int, ...] = "none",
    allow_no_prefix: bool = False,
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """The paper's method, every ingredient a switch.

    Where norms come last (BERT), the residual connection needs what a norm gives, so that steps cannot migrate into it:
    they stay static, with one multiplication for every element.

    weight_bits, activation_bits: codes of weights and of norm outputs (4 or 8; 8 costs nothing extra on GPUs without
        int4 tensor cores).
    quantile: 1 = ranges are the largest magnitudes; below 1 = that quantile.
    split: share of extra slots for strong channels; 0 = none; auto = chosen per site on held-out tokens.
    strength: what splitting evens out: the step, or the folded weight column.
    stagger: copies of a channel round at different phases (our extension).
    width: prune weak channels back to the old width, pad to a multiple of `tile` extra slots, or keep all slots.
    clip: joint = clip ratios accepted by the output error with quantized weights; activation; none.
    compensation: least_squares (closed form), low_rank (trained against the block's float output), none; `ridge` is the
        least squares' pull towards the uncorrected weight.
    rounding: gptq, rtn or quantease (GPTQ polished).
    other: inputs of o_proj and down_proj: dynamic (a scale per token with a static clip ratio), static (steps migrate
        into v_proj and up_proj), hadamard (online rotation, dynamic), hadamard-static (online rotation, one static
        step). `other_bits` and `other_split` as at the norms.
    fine_tune: epochs of training all steps, and a scale per channel in front of the rotation of hadamard-static inputs,
        against the float block's output, before weights are compensated and rounded; 0 = none. Needs a static `other`.
        Nothing is added at run time.
    prefix (or prefix_tokens): none, bos, auto (outlier tokens are searched, as prefixquant does), or token ids: their
        keys and values are stored and start every cache. Static inputs at o_proj and down_proj need one: massive
        activations would stretch their step.
    allow_no_prefix: run without a prefix all the same, to measure what it brings.
    """
    if other in ("static", "hadamard-static") and prefix == "none" and not allow_no_prefix:
        raise RecipeError(
            f"recipe with other={other!r} needs a prefix: massive activations of the first token would stretch every "
            "static step. Set prefix=bos (or auto, for a model without BOS), or other=dynamic; allow_no_prefix=true "
            "measures the loss"
        )
    if fine_tune < 0:
        raise RecipeError(f"recipe with fine_tune={fine_tune}: it is a number of epochs; 0 = none")
    if fine_tune and (other in ("dynamic", "hadamard") or compensation == "low_rank"):
        raise RecipeError(
            f"recipe with fine_tune={fine_tune} trains static steps before anything is compensated; set "
            "other=hadamard-static (or static) and compensation=least_squares or none"
        )
    budgets = AUTO_BUDGETS if split == "auto" else (float(split),)
    pads = tile if width == "pad" else 0
    prunes = width == "prune"
    steps: list[Step] = [Ranges(NORM, activation_bits, quantile)]
    if budgets != (0.0,):
        steps.append(Split(NORM, budgets, pads, strength, stagger, prunes, weight_bits))
    if clip != "none":
        steps.append(Clip(NORM, clip, rounding=rounding, weight_bits=weight_bits))
    if prunes and budgets != (0.0,):
        steps.append(Prune(NORM))
    steps += _other_inputs(other, other_bits, other_split, stagger, clip, rounding, weight_bits)
    if fine_tune:
        steps.append(TuneBlock(weight_bits, 5e-3, 0.0, 2e-2, fine_tune, chunks=4, batch_tokens=1024))
    if compensation == "least_squares":
        steps.append(Compensate(NORM, ridge))
    if compensation == "low_rank":
        steps.append(LowRank(weight_bits=weight_bits))
    steps.append(Round(method=rounding, bits=weight_bits))
    return tuple(steps), prefix


def _other_inputs(
    other: Other, bits: int, split: float, stagger: bool, clip: Clipping, rounding: Rounding, weight_bits: int
) -> list[Step]:
    if other == "dynamic":
        return [TokenInput(OTHER, bits)]
    if other == "hadamard":
        return [Rotate(OTHER), TokenInput(OTHER, bits)]
    if other == "hadamard-static":
        return [Rotate(OTHER), TensorInput(OTHER, bits)]
    steps: list[Step] = [Ranges(OTHER, bits)]
    if split > 0:
        steps.append(Split(OTHER, (split,), stagger=stagger, weight_bits=weight_bits))
    if clip != "none":
        steps.append(Clip(OTHER, clip, rounding=rounding, weight_bits=weight_bits))
    return steps
