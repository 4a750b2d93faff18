"""QServe's QoQ: W4A8KV4, with 4-bit weights in groups that are still one int8 GEMM; the W4A8 yardstick.

"QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", MLSys 2025, arXiv 2405.04532. Order as in
the reference code: rotate, reorder, smooth, round; activations have a dynamic scale per token.

Where this differs from the reference code: a run's seed draws the signs of the rotation (there: none); GPTQ's Hessian
is that of quantized inputs; scales of rows are float32 (there: float16), which costs 16 bits more a row; integer steps
of groups are searched (`weight_clip=false` takes the smallest that covers the group). With `group_size=0` a row is one
group of the same format; the search of clip ranges and of SmoothAttention's exponent that the paper's per-channel
variant has is left out.

Keys and values: a checkpoint holds static 4-bit steps per head and channel (`--kv 4`), the paper has a dynamic scale
and zero per token and head. Steps per channel take SmoothAttention's scales up whole, so there it changes nothing; it
is what makes a scale per token and head work.

Measured on `ref` (16 calibration windows of 512 tokens, first 8 windows of the WikiText-2 test text, one seed):
increase of the mean NLL 0.013, at 4.19 bits a weight.
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Reorder, RotateResidual, Round, ScaleChannels, SmoothAttention, Step, TokenInput

__all__ = ["qserve"]

GROUPS, ROWS = "W4A8KV4, groups of 128", "W4A8KV4, per channel"
EXPECTED = (
    Figure("WikiText-2 perplexity", 5.67, f"Llama-2-7B, {GROUPS} (float 5.47)", "repository (deepcompressor)"),
    Figure("WikiText-2 perplexity", 5.06, f"Llama-2-13B, {GROUPS} (float 4.88)", "repository (deepcompressor)"),
    Figure("WikiText-2 perplexity", 3.46, f"Llama-2-70B, {GROUPS} (float 3.32)", "repository (deepcompressor)"),
    Figure("WikiText-2 perplexity", 6.70, f"Llama-3-8B, {GROUPS} (float 6.14)", "repository (deepcompressor)"),
    Figure("WikiText-2 perplexity", 5.75, f"Llama-2-7B, {ROWS} (float 5.47)", "repository (deepcompressor)"),
    Figure("WikiText-2 perplexity", 6.81, f"Llama-3-8B, {ROWS} (float 6.14)", "repository (deepcompressor)"),
    Figure("throughput, tokens/s", 2908, "Llama-2-7B, A100, 1024 in, 512 out (TensorRT-LLM W8A8 2334)", "paper"),
)
ALPHA, ALPHA_ROWS = 0.3, 0.1  # of smoothing, with groups and without


@register_recipe("qserve", paper="QServe, arXiv 2405.04532", expected=EXPECTED)
def qserve(
    *,
    group_size: int = 128,
    activation_bits: int = 8,
    rotate: bool = True,
    reorder: bool = True,
    alpha: float | Literal["default"] = "default",
    attention_alpha: float = 0.5,
    rounding: Literal["gptq", "rtn"] = "gptq",
    weight_clip: bool = True,
    activation_order: bool = True,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """W4A8: int8 per row, 4-bit groups of these codes with integer steps; rotated, reordered, smoothed; GPTQ.

    group_size: columns that share an integer step and zero; a smaller one where it does not divide a width; 0 = a row.
    activation_bits: 8.
    rotate: residual stream and value heads, fused into the weights; false serves models that cannot be rotated.
    reorder: inputs of down_proj in order of their size, fused into gate, up and down; with groups only.
    alpha: exponent of down_proj's smoothing, max|X|^alpha / max|W|^(1 - alpha); default = 0.3 with groups, else 0.1.
    attention_alpha: exponent of SmoothAttention; 0 leaves queries and keys alone.
    rounding: gptq or rtn; weight_clip: search the integer step of every group; activation_order, damping: as in GPTQ.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    steps: list[Step] = [RotateResidual()] if rotate else []
    if attention_alpha > 0:
        steps.append(SmoothAttention(attention_alpha))
    if reorder and group_size:
        steps.append(Reorder())
    exponent = (ALPHA if group_size else ALPHA_ROWS) if alpha == "default" else float(alpha)
    steps.append(ScaleChannels(("mlp_output",), "smooth", (exponent,)))
    steps.append(TokenInput(bits=activation_bits, search=False))
    steps.append(
        Round(
            method=rounding,
            group_size=group_size,
            fit_groups=True,
            clip=weight_clip,
            damping=damping,
            activation_order=activation_order,
            levels=2,
        )
    )
    return tuple(steps), prefix
