"""OutlierTune: channels are centred, then static steps per channel behind norms are multiplied into the weights.

"OutlierTune: Efficient Channel-Wise Quantization for Large Language Models", arXiv 2406.18832; its body was not
available to this project, the author's two code bases were (May and August 2024, called so below).

Norm sites: each channel's middle leaves the norm (its bias) and comes back through the consumers' biases
("symmetrization"); then a step per channel is folded into the weights ("pre-execution of dequantization"). That is
MergeQuant without splitting, joint clipping, dropping and compensation, and with a shift.

Where this differs from the code: ranges are calibrated with upstream layers quantized, as everywhere in this package;
weight rows are symmetric (there: with a zero point); what q, k and v give is not quantized; clip ratios of tokens are
searched on pooled tokens (there: an odd running rule). An RMSNorm gets a real bias, as in the code of August; it is
inside the norm that emits codes, and costs one addition for every element at run time. A post-norm model (BERT) keeps
shift and steps at the inputs of the linears.

Measured on `ref` (16 calibration windows of 512 tokens, their 2 held-out windows, one seed): increase of the mean NLL
at W4A4 0.177.
"""

from typing import Literal

from mergequant.models.roles import SiteKind
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Clip, Ranges, Round, RoundingName, ShiftChannels, Step, TokenInput

__all__ = ["outliertune"]

PAPER = "OutlierTune, arXiv 2406.18832"
EXPECTED = (
    Figure("end-to-end speed-up over FP16", 1.48, "INT8 kernels, with about half the memory", "abstract"),
    Figure("zero-shot average", 71.4, "OPT-175B, INT8 per-channel activations (float 71.6)", "SmoothQuant, table 1"),
)
FED: tuple[SiteKind, ...] = ("norm", "stream")
OTHER: tuple[SiteKind, ...] = ("attention_output", "mlp_output")
CLIP_LEAST, CLIP_STEPS = 0.21, 80  # shares 1.00, 0.99, ... 0.21


@register_recipe("outliertune", paper=PAPER, expected=EXPECTED)
def outliertune(
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    symmetrize: bool = True,
    shift_threshold: float = 0.0,
    skip: int = 0,
    clip: Literal["none", "activation"] = "none",
    rounding: RoundingName = "gptq",
    weight_clip: bool = True,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Channels centred, a static step per channel behind norms, a scale per token in front of o_proj and down_proj.

    weight_bits, activation_bits: the paper's 8 and 8, or 6 and 6; 4 and 4 shows what MergeQuant adds.
    symmetrize: subtract every channel's middle: the mean over windows of (max + min) / 2. RMSNorms get a bias.
    shift_threshold: leave out shifts below this share of the largest one.
    skip: tokens at the start of every window that do not count for the middle; 1 = without BOS.
    clip: activation = a range per channel, of least error at the activation itself (August); none = the largest
        magnitude (May).
    rounding, weight_clip: gptq with row ranges searched (August), or rtn (May).
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    steps: list[Step] = []
    if symmetrize:
        steps.append(ShiftChannels(FED, "mean", threshold=shift_threshold, skip=skip))
    steps.append(Ranges(FED, activation_bits))
    if clip == "activation":
        steps.append(Clip(FED, "activation", least=CLIP_LEAST, steps=CLIP_STEPS, weight_bits=weight_bits))
    steps.append(TokenInput(OTHER, activation_bits))
    steps.append(Round(method=rounding, bits=weight_bits, clip=weight_clip))
    return tuple(steps), prefix
