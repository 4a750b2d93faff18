"""VPTQ: weights as indices into codebooks of vectors, at about 2 bits.

"VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", EMNLP 2024, arXiv 2409.17066. The
defaults are the paper's 2.02 bits for Llama-2-7B: vectors of 6 outputs, 4096 entries, nothing else.

Where this differs from the paper and its code: inputs are those of the quantized model upstream (there: of the float
model, all layers at once); columns are coded in the order of the Hessian's diagonal also where one codebook serves all;
layer-wise tuning takes all calibration tokens at once, through their Gram matrix (there: batches; the released code has
none). The optional norm of columns and end-to-end tuning are left out.

Codebooks are stored for every linear: on small models they outweigh the indices (4096 entries of 6 take 1.5 bits a
weight of a 512 x 512 layer), of which a run warns, with the true bits. There, `vector=4 bits=8` or `vector=8 bits=8
residual_bits=8` are in proportion.
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import RoundVectors, Step

__all__ = ["vptq"]

EXPECTED = (
    Figure("WikiText-2 perplexity", 6.13, "Llama-2-7B, 2.02 bits, tuned end to end (float 5.12)", "paper"),
    Figure("WikiText-2 perplexity", 5.95, "Llama-2-7B, 2.26 bits, tuned end to end (float 5.12)", "paper"),
    Figure("WikiText-2 perplexity", 5.32, "Llama-2-13B, 2.02 bits, tuned end to end (float 4.57)", "paper"),
    Figure("WikiText-2 perplexity", 6.29, "Llama-2-13B, v6 k4096, not tuned (float 4.57)", "paper, ablation"),
    Figure("WikiText-2 perplexity", 6.07, "Llama-2-13B, v6 k4096, tuned layer by layer", "paper, ablation"),
    Figure("WikiText-2 perplexity", 7.21, "Llama-2-13B, v4 k256, not tuned", "paper, ablation"),
    Figure("WikiText-2 perplexity", 9.29, "Llama-3-8B, 2.08 bits (float 6.14)", "paper"),
)


@register_recipe("vptq", paper="VPTQ, arXiv 2409.17066", expected=EXPECTED)
def vptq(
    *,
    vector: int = 6,
    bits: int = 12,
    residual_bits: int = 0,
    groups: int = 1,
    outlier_share: float = 0.0,
    outlier_vector: int = 4,
    outlier_bits: int = 12,
    tune: Literal["none", "adam", "least_squares"] = "none",
    tune_steps: int = 100,
    tune_rate: float = 1e-4,
    iterations: int = 100,
    damping: float = 0.01,
    activation_order: bool = True,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only, about 2 bits: vectors of outputs from k-means codebooks, with error feedback column by column.

    vector: outputs that share an index; bits: of an index, 2^bits entries a codebook; residual_bits: of a second one
        whose entry is added (0 = none); groups: codebooks, each for an equal run of columns.
    outlier_share: of the columns, the strongest, that have a codebook of their own: outlier_vector, outlier_bits.
    tune: adam (the paper's layer-wise tuning of centroids), least_squares (their best by conjugate gradients) or none;
        tune_steps; tune_rate: adam's.
    iterations: of k-means; damping, activation_order: as in GPTQ.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    step = RoundVectors(
        damping=damping,
        activation_order=activation_order,
        iterations=iterations,
        vector=vector,
        bits=bits,
        residual_bits=residual_bits,
        groups=groups,
        outlier_share=outlier_share,
        outlier_vector=outlier_vector,
        outlier_bits=outlier_bits,
        tune=tune,
        tune_steps=tune_steps,
        tune_rate=tune_rate,
    )
    return (step,), prefix
