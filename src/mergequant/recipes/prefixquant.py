"""PrefixQuant: outlier tokens move into the KV cache; what is left is quantized with one static step per tensor.

"PrefixQuant: Static Quantization Beats Dynamic through Prefixed Outliers in LLMs", arXiv 2410.05265. The tokens are
found by the paper's rule (`pipeline/prefix.py`), their keys and values are computed once in floating point and start
every cache; under that, QuaRot's rotations, and for the input of every linear one step, found by a grid search.

Where this differs from the paper, which was available as a digest: the step is judged by the output error of the
linears; a checkpoint's steps for a quantized cache are per head and channel (there: per head), so the rotation of
queries and keys (R3), which matters for the cache alone, is left out; without fine-tuning weights are rounded by GPTQ,
`rounding=rtn` is nearest. Fine-tuning is an option here (`fine_tune`, epochs), with few steps and larger learning
rates, so that two CPU cores do; the paper's: 20 epochs over 512 x 1024 tokens, learning rate 5e-5 for scales.

Measured (16 calibration windows of 512 tokens, first 8 windows of the WikiText-2 test text, one seed): increase of the
mean NLL 0.055 on `ref` and 0.117 on `ref_outlier`; on `ref` with rounding=rtn 0.069, with fine_tune=10 0.059.
"""

from typing import Literal

from mergequant.errors import RecipeError
from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import Rotate, RotateResidual, Round, RoundingName, Step, TensorInput, TuneBlock

__all__ = ["prefixquant"]

STATIC = "static W4A4KV4, per tensor"
EXPECTED = (
    Figure("WikiText-2 perplexity", 7.43, f"Llama-3-8B {STATIC} (float 6.14)", "abstract"),
    Figure("zero-shot average of 5 tasks", 71.08, f"Llama-3-8B {STATIC}", "abstract"),
    Figure("WikiText-2 points better than QuaRot", 0.98, f"Llama-3-8B {STATIC}, QuaRot dynamic", "abstract"),
    Figure("accuracy points better than QuaRot", 5.98, f"Llama-3-8B {STATIC}, 5 tasks, QuaRot dynamic", "abstract"),
)


@register_recipe("prefixquant", paper="PrefixQuant, arXiv 2410.05265", expected=EXPECTED)
def prefixquant(
    *,
    weight_bits: int = 4,
    activation_bits: int = 4,
    heads: Literal["fused", "online", "none"] = "fused",
    grid: int = 40,
    rounding: RoundingName = "gptq",
    weight_clip: bool = True,
    damping: float = 0.01,
    fine_tune: int = 0,
    prefix: str | tuple[int, ...] = "auto",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Fully static: outlier tokens prefixed in the cache, rotations, one grid-searched step for every input.

    weight_bits, activation_bits: 4 and 4; 8-bit activations cost nothing extra on GPUs without int4 tensor cores.
    heads: as in quarot: fused = values of each head are rotated in the weights; online = the whole input of o_proj is
        rotated at run time; none.
    grid: number of steps tried for every input, from the largest magnitude down to a fiftieth of it; 1 = no search.
    rounding: gptq, rtn or quantease; weight_clip: search row ranges; damping: as in GPTQ.
    fine_tune: epochs of training steps, row ranges and weights block by block; weights are then rounded to the nearest
        code within the trained ranges, whatever `rounding` and `weight_clip` say; 0 = none.
    prefix: auto = outlier tokens are searched; bos; token ids; none, to measure what the prefix brings.
    """
    if grid < 1:
        raise RecipeError(f"recipe 'prefixquant': grid {grid} must be at least 1 (1 = no search)")
    if fine_tune < 0:
        raise RecipeError(f"recipe 'prefixquant': fine_tune {fine_tune} is a number of epochs; 0 = none")
    steps: list[Step] = [
        RotateResidual(heads=heads == "fused"),
        Rotate(("attention_output", "mlp_output") if heads == "online" else ("mlp_output",)),
        TensorInput(bits=activation_bits, steps=grid),
    ]
    if fine_tune:
        steps += [TuneBlock(weight_bits, epochs=fine_tune), Round(method="rtn", bits=weight_bits, clip=False)]
    else:
        steps.append(Round(method=rounding, bits=weight_bits, clip=weight_clip, damping=damping))
    return tuple(steps), prefix
