"""Which token comes next: the likeliest one, or one drawn by temperature, top-k and top-p.

Random numbers are drawn beforehand, one per row and step, and turned into tokens through the inverse of the cumulative
probability. A captured graph then needs no generator, and a seed gives the same text with and without graphs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError

__all__ = ["Sampling", "SamplingKind", "choose", "uniform_numbers"]

BELOW_ONE = 1 - 1e-6  # keeps u * total below the total after rounding, so that the draw never runs off the end


@dataclass(frozen=True)
class SamplingKind:
    """What shapes the computation, and so the graph; temperature and top_p are numbers in tensors."""

    greedy: bool
    top_k: int = 0
    nucleus: bool = False


@dataclass(frozen=True)
class Sampling:
    """How to draw.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0: all.
        top_p: among those, the likeliest that together reach this probability; 1: all.
        seed: of the random numbers.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(f"{self}: temperature and top_k must be >= 0, top_p in (0, 1]")

    @property
    def kind(self) -> SamplingKind:
        if self.temperature == 0:
            return SamplingKind(greedy=True)
        return SamplingKind(greedy=False, top_k=self.top_k, nucleus=self.top_p < 1)


def uniform_numbers(seed: int, steps: int, rows: int) -> Tensor:
    """float32 (steps, rows) in [0, 1), drawn on the CPU: the same for every device."""
    return torch.rand(steps, rows, generator=torch.Generator().manual_seed(seed), device="cpu") * BELOW_ONE


def choose(logits: Tensor, kind: SamplingKind, uniform: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """The next token of each row.

    Args:
        logits: (B, vocabulary) float.
        kind: which of the following count.
        uniform: float32 (B,) in [0, 1).
        temperature, top_p: float32 (1,).

    Returns:
        int64 (B,).
    """
    if kind.greedy:
        return logits.argmax(-1)
    values = logits.float() / temperature
    tokens = None
    if kind.top_k:
        values, tokens = values.topk(min(kind.top_k, values.shape[-1]))  # likeliest first
    elif kind.nucleus:
        values, tokens = values.sort(descending=True)
    probabilities = values.softmax(-1)
    if kind.nucleus:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp_max(cumulative.shape[-1] - 1)
    return (place if tokens is None else tokens.gather(-1, place)).squeeze(-1)
