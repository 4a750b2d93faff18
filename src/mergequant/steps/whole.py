"""Steps that build schemes without a scale per channel: rotation, token scales, one static step."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import IntegerGrid
from mergequant.steps.base import SiteStep
from mergequant.transforms import TensorScheme, TokenScheme, even_fractions

__all__ = ["Rotate", "TensorInput", "TokenInput"]


@dataclass(frozen=True)
class Rotate(SiteStep):
    """Rotate the input online by a Hadamard-like rotation and the weights to match (QuaRot's online Hadamard)."""

    name: ClassVar[str] = "rotate"

    def run(self, context: SiteContext) -> None:
        context.rotate()


@dataclass(frozen=True)
class TokenInput(SiteStep):
    """A dynamic scale per token, times one static clip ratio per site (digest, step 6).

    The ratio minimises the mean over tokens of sum_n |dY_n|^norm; where the worst token's loss exceeds `trim_above`
    times the mean, the `trim` worst tokens are left out, so that a massive-activation token does not decide for all.

    Attributes:
        bits: bits of the codes.
        search: search the clip ratio; else use `clip_ratio`.
        clip_ratio: the ratio without a search.
        norm, least, steps: exponent, smallest ratio, number of ratios tried.
        trim, trim_above: see above.
        sample_tokens: tokens of the search.
    """

    name: ClassVar[str] = "token_input"
    bits: int = 4
    search: bool = True
    clip_ratio: float = 1.0
    norm: float = 2.4
    least: float = 0.51
    steps: int = 50
    trim: int = 3
    trim_above: float = 20.0
    sample_tokens: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.clip_ratio <= 1:
            raise RecipeError(f"token_input: clip_ratio {self.clip_ratio} is outside (0, 1]")

    def run(self, context: SiteContext) -> None:
        ratio = self._search(context) if self.search else self.clip_ratio
        context.scheme = TokenScheme(self.bits, ratio)
        held_out = context.sample("held_out", self.sample_tokens)
        context.report(clip_ratio=ratio, clamped=context.scheme.clamped(held_out))

    def _search(self, context: SiteContext) -> float:
        weight = context.stacked_weight()
        sample = context.sample("calibration", self.sample_tokens)
        best_ratio, best_loss = 1.0, float("inf")
        for ratio in even_fractions(self.least, self.steps):
            error = (TokenScheme(self.bits, ratio).values(sample) - sample) @ weight.t()
            per_token = error.abs_().pow_(self.norm).sum(1)
            if self.trim and float(per_token.max()) > self.trim_above * float(per_token.mean()):
                per_token = torch.sort(per_token).values[: -self.trim]
            loss = float(per_token.mean())
            if loss < best_loss:
                best_ratio, best_loss = ratio, loss
        return best_ratio


@dataclass(frozen=True)
class TensorInput(SiteStep):
    """One static step for the whole input, the one with the least squared output error.

    Attributes:
        bits: bits of the codes.
        least: smallest share of the largest magnitude that the grid may cover.
        steps: number of shares tried, evenly spaced in the logarithm.
        sample_tokens: tokens of the search.
    """

    name: ClassVar[str] = "tensor_input"
    bits: int = 4
    least: float = 0.02
    steps: int = 40
    sample_tokens: int = 2048

    def run(self, context: SiteContext) -> None:
        weight = context.stacked_weight()
        sample = context.sample("calibration", self.sample_tokens)
        largest = max(float(chunk.abs().max()) for chunk in context.chunks())
        unclipped = max(largest, 1e-12) / IntegerGrid(self.bits).high
        best = TensorScheme(self.bits, unclipped)
        best_loss = float("inf")
        for i in range(self.steps):
            scheme = TensorScheme(self.bits, unclipped * self.least ** (i / max(self.steps - 1, 1)))
            error = scheme.values(sample).mul_(scheme.step).sub_(sample) @ weight.t()
            loss = float(error.square().sum())
            if loss < best_loss:
                best, best_loss = scheme, loss
        context.scheme = best
        held_out = context.sample("held_out", self.sample_tokens)
        context.report(covered=best.step / unclipped, clamped=best.clamped(held_out))
