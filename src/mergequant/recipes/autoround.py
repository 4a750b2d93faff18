"""AutoRound: which way every weight is rounded is learned, block by block, by the sign of the gradient.

"Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (SignRound), arXiv 2309.05516.

Where this differs from the released code: about 200 steps, as there, but of 512 tokens from 16384 that come in order,
so that two CPU cores do (there: batches of 8 x 2048 tokens drawn from 512 x 2048; `batch_tokens`, `chunks`); the last
state is kept, at a learning rate of almost nothing (there: the one of least loss). Scales are float32.
"""

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import LearnRounding, RoundLearned, Step

__all__ = ["autoround"]

EXPECTED = (
    Figure("accuracy points better than others, least", 6.91, "W2, mean of 11 tasks, several models", "abstract"),
    Figure("accuracy points better than others, most", 33.22, "W2, mean of 11 tasks, several models", "abstract"),
)


@register_recipe("autoround", paper="SignRound, arXiv 2309.05516", expected=EXPECTED)
def autoround(
    *,
    weight_bits: int = 4,
    group_size: int = 128,
    zeros: bool = True,
    epochs: int = 6,
    chunks: int = 4,
    batch_tokens: int = 512,
    rate: float = 1.0,
    range_rate: float = 1.0,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: rounding offsets and ranges of groups trained by signed gradients against the float block.

    weight_bits, group_size: where the group size does not divide a width, a smaller one that does is taken, or a scale
        per row; 0 = a scale per row. zeros: a zero point for every scale.
    epochs, chunks, batch_tokens: passes over how many chunks of about 4096 tokens, and tokens of one step.
    rate: of offsets, times the number of steps: with 1 the sum of all steps is half a code, as in the paper.
    range_rate: the same for both ends of the ranges; 0 leaves them alone.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    learn = LearnRounding(weight_bits, group_size, zeros, epochs, chunks, batch_tokens, rate, range_rate)
    place = RoundLearned(bits=weight_bits, group_size=group_size, fit_groups=True, zeros=zeros, dense=True)
    return (learn, place), prefix
