"""Steps that build a static scale per channel: ranges, splitting, clipping, dropping (MergeQuant digest, steps 1-5)."""

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError, UsageError
from mergequant.grids import IntegerGrid
from mergequant.steps.base import SiteStep
from mergequant.steps.judge import Judge, RoundingName
from mergequant.transforms import ChannelScheme, channel_clip_ratios, drop_slots, split_channels, split_counts

__all__ = ["Clip", "Prune", "Ranges", "Split"]

DEAD_RANGE = 1e-8  # relative to the site's largest range: such a channel carries nothing


@dataclass(frozen=True)
class Ranges(SiteStep):
    """Static range of every channel: step = absmax / high (digest, step 1).

    Attributes:
        bits: bits of the codes.
        quantile: 1 = the largest magnitude seen; below 1 = that quantile of |x| on a sample of tokens.
        sample_tokens: size of that sample.
    """

    name: ClassVar[str] = "ranges"
    bits: int = 4
    quantile: float = 1.0
    sample_tokens: int = 16384

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise RecipeError(f"ranges: quantile {self.quantile} is outside (0, 1]")

    def run(self, context: SiteContext) -> None:
        if self.quantile < 1:
            sample = context.sample("calibration", self.sample_tokens)
            largest = torch.quantile(sample.abs(), self.quantile, dim=0)
        else:
            largest = torch.zeros(context.site.width, device=context.block.device)
            for chunk in context.chunks():
                largest = torch.maximum(largest, chunk.abs().amax(0))
        largest = tie_channels(context, largest)
        alive = largest > DEAD_RANGE * largest.max()
        step = torch.where(alive, largest / IntegerGrid(self.bits).high, torch.zeros_like(largest))
        context.scheme = ChannelScheme.plain(step.float(), self.bits)
        context.report(dead_channels=float((~alive).sum()))


@dataclass(frozen=True)
class Split(SiteStep):
    """Split strong channels into copies, so that the folded weight columns become even (digest, step 4 and choice B).

    Attributes:
        budgets: candidate shares of extra slots; with several, the joint loss on held-out tokens picks one per site.
        tile: extra slots are rounded up to a multiple of this; 0 = down to an even number.
        strength: what is evened: "column" = largest |W'| of a column, "step" = the step (as the paper's outline says).
        stagger: copies round at different phases (our extension, choice A).
        weight_bits: bits assumed by the joint loss.
    """

    name: ClassVar[str] = "split"
    budgets: tuple[float, ...] = (0.05,)
    tile: int = 0
    strength: Literal["column", "step"] = "column"
    stagger: bool = False
    prune: bool = False
    weight_bits: int = 4

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 <= budget <= 1 for budget in self.budgets):
            raise RecipeError(f"split: budgets {self.budgets} must be shares between 0 and 1")
        if self.strength not in ("column", "step"):
            raise RecipeError(f"split: strength {self.strength!r} is not 'column' or 'step'")

    def run(self, context: SiteContext) -> None:
        scheme = channel_scheme(context, self.name)
        candidates = {budget: self._split(context, scheme, budget) for budget in self.budgets}
        best = self.budgets[0]
        if len(candidates) > 1:
            judge = Judge("gptq", self.weight_bits)
            final = candidates
            if self.prune:
                energy = channel_energy(context, scheme)
                final = {
                    budget: dropped_to_width(context, candidate, energy) for budget, candidate in candidates.items()
                }
            losses = {budget: judge.relative_error(context, final[budget]) for budget in self.budgets}
            best = min(losses, key=lambda budget: losses[budget])
        context.scheme = candidates[best]
        copies = torch.bincount(context.scheme.index)
        context.report(split_budget=best, split_channels=float((copies > 1).sum()), most_copies=float(copies.max()))

    def _split(self, context: SiteContext, scheme: ChannelScheme, budget: float) -> ChannelScheme:
        width = scheme.step.shape[0]
        extra = ceil(budget * width / self.tile) * self.tile if self.tile else int(budget * width)
        extra += (width + extra) % 2  # two 4-bit codes share a byte
        column = context.stacked_weight().abs().amax(0) * scheme.step if self.strength == "column" else scheme.step
        return split_channels(scheme.step, split_counts(column, extra), scheme.bits, stagger=self.stagger)


@dataclass(frozen=True)
class Clip(SiteStep):
    """Adaptive clipping: a ratio per channel, accepted by the joint loss (digest, step 5 and choice D).

    Attributes:
        mode: "joint" = ratios^lambda with the lambda of least joint loss; "activation" = the ratios as they are (the
            predecessor's way, which the digest found to hurt); "none".
        norm: exponent of the activation error.
        least, steps: smallest ratio and number of ratios tried.
        lambdas: exponents tried by "joint"; 0 stands for no clipping.
        rounding: how the joint loss rounds weights.
        sample_tokens: tokens of the activation search.
        weight_bits: bits assumed by the joint loss.
    """

    name: ClassVar[str] = "clip"
    mode: Literal["joint", "activation", "none"] = "joint"
    norm: float = 2.4
    least: float = 0.4
    steps: int = 25
    lambdas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rounding: RoundingName = "gptq"
    sample_tokens: int = 4096
    weight_bits: int = 4

    def __post_init__(self) -> None:
        if self.mode not in ("joint", "activation", "none"):
            raise RecipeError(f"clip: mode {self.mode!r} is not 'joint', 'activation' or 'none'")
        if not self.lambdas:
            raise RecipeError("clip: lambdas is empty; give at least one exponent")

    def run(self, context: SiteContext) -> None:
        if self.mode == "none":
            return
        scheme = channel_scheme(context, self.name)
        copies = torch.bincount(scheme.index, minlength=scheme.step.shape[0])
        stagger = bool(scheme.offset.any())
        sample = context.sample("calibration", self.sample_tokens)
        ratios = channel_clip_ratios(
            sample,
            scheme.step,
            copies,
            scheme.bits,
            stagger=stagger,
            norm=self.norm,
            least=self.least,
            steps=self.steps,
        )
        ratios = tie_channels(context, ratios)
        exponents = self.lambdas if self.mode == "joint" else (1.0,)
        candidates = {power: replace(scheme, step=scheme.step * ratios**power) for power in exponents}
        best = exponents[0]
        if len(candidates) > 1:
            judge = Judge(self.rounding, self.weight_bits)
            losses = {power: judge.relative_error(context, candidates[power]) for power in exponents}
            best = min(losses, key=lambda power: losses[power])
        context.scheme = candidates[best]
        held_out = context.sample("held_out", self.sample_tokens)
        context.report(clip_lambda=best, clamped=context.scheme.clamped(held_out))


@dataclass(frozen=True)
class Prune(SiteStep):
    """Drop the least important unsplit slots until the site has its old width again (digest, choice C)."""

    name: ClassVar[str] = "prune"

    def run(self, context: SiteContext) -> None:
        scheme = channel_scheme(context, self.name)
        context.scheme = dropped_to_width(context, scheme, channel_energy(context, scheme))
        context.report(dropped_channels=float(scheme.width - context.scheme.width))


def channel_scheme(context: SiteContext, step: str) -> ChannelScheme:
    """The site's per-channel scheme, which `ranges` must have made before."""
    if not isinstance(context.scheme, ChannelScheme):
        raise RecipeError(f"{context.name}: step {step!r} needs per-channel ranges; put the step 'ranges' before it")
    return context.scheme


def channel_energy(context: SiteContext, scheme: ChannelScheme) -> Tensor:
    """Sum over calibration tokens of every channel's squared code, unsplit (channels,)."""
    return context.energy(ChannelScheme.plain(scheme.step, scheme.bits).values)


def dropped_to_width(context: SiteContext, scheme: ChannelScheme, energy: Tensor) -> ChannelScheme:
    """The scheme with its least important slots dropped, back at the site's width."""
    surplus = scheme.width - context.site.width
    surplus += (scheme.width - surplus) % 2
    if surplus <= 0:
        return scheme
    try:
        return drop_slots(scheme, energy, scheme.fold(context.stacked_weight()), surplus)
    except UsageError as error:
        raise RecipeError(f"{context.name}: {error}") from error


def tie_channels(context: SiteContext, values: Tensor) -> Tensor:
    """The largest value over the channels that one producer row feeds (query heads that share a value head)."""
    producer = context.site.producer
    if context.site.kind == "norm" or producer is None or context.rotation:
        return values
    channel = torch.tensor(producer.channel, device=values.device)
    rows = torch.zeros(producer.rows.stop - producer.rows.start, dtype=values.dtype, device=values.device)
    return rows.scatter_reduce(0, channel, values, "amax", include_self=True)[channel]
