"""QLLM's channel reassembly at work on a site: ranges, the search for the threshold, what feeds the site changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import AbsMax, IntegerGrid, Quantizer
from mergequant.models import Site
from mergequant.solvers import rtn
from mergequant.steps.base import SiteStep
from mergequant.steps.module_output import LinearOutput, ModuleOutput
from mergequant.transforms import (
    Distance,
    Reassembly,
    TokenScheme,
    disassemblies,
    merge_distance,
    merge_groups,
    split_counts,
)

__all__ = ["Reassemble"]


@dataclass(frozen=True)
class Reassemble(SiteStep):
    """Take strong channels apart, put like ones together, and give every token a scale (QLLM digest, steps 1-3).

    How many slots are added, and saved again, is the choice that changes the output of the module behind the site
    least, inputs and weights rounded to nearest; for down_proj, which is a module by itself, its own output. The
    constants of the channels move into the norm or the producer's rows. A site where nothing can take them up, or where
    one row feeds several channels, gets token scales alone, and its figures say so (`reassembled` = 0).

    Attributes:
        bits, weight_bits: of the codes.
        most: share of channels that may be added at most, in the search.
        expansion: 0 = searched; else the share to add, at the smallest threshold that this allows.
        merge: save as many slots as were added; else the site becomes wider.
        distance: what merging is judged by, see `transforms.merge_distance`.
        tried: thresholds that the search tries at most, of all that differ, denser where few slots are added; 0 = all.
        chunks: calibration chunks (of about 4096 tokens) that the search looks at.
    """

    name: ClassVar[str] = "reassemble"
    bits: int = 4
    weight_bits: int = 4
    most: float = 0.2
    expansion: float = 0.0
    merge: bool = True
    distance: Distance = "output"
    tried: int = 0
    chunks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 0.5 or not 0 <= self.expansion <= 0.5:
            raise RecipeError(
                f"reassemble: most {self.most} and expansion {self.expansion} must lie between 0 and 0.5: no more than "
                "every other channel can be merged"
            )
        if self.tried < 0 or self.chunks < 1:
            raise RecipeError(f"reassemble: tried {self.tried} must not be negative, chunks {self.chunks} be positive")

    def run(self, context: SiteContext) -> None:
        able = can_divide(context.site)
        context.report(reassembled=float(able))
        candidates = self._candidates(context) if able else {}
        if not candidates:
            context.scheme = TokenScheme(self.bits)
            return
        best = next(iter(candidates))
        if len(candidates) > 1:
            losses = self._losses(context, candidates)
            best = min(losses, key=lambda threshold: losses[threshold])
            plain = losses[max(losses)]  # the largest threshold splits nothing
            context.report(candidates=float(len(losses)), loss_share=losses[best] / max(plain, 1e-30))
        chosen = candidates[best]
        copies = chosen.copies
        extra = int(copies.sum()) - copies.shape[0]
        context.report(threshold=best, expansion=extra / copies.shape[0], most_copies=float(copies.max()))
        if extra == 0:
            context.scheme = TokenScheme(self.bits)
            return
        context.scale_channels(chosen.divisor.float())
        context.scheme = chosen.scheme(self.bits)

    def _candidates(self, context: SiteContext) -> dict[float, Reassembly]:
        """What can be done to the site's channels, by threshold."""
        strength = torch.stack([chunk.abs().amax(0) for chunk in context.chunks()]).amax(0)
        channels = strength.shape[0]
        if not bool((strength > 0).any()):
            return {}
        if self.expansion > 0:
            counts = split_counts(strength, int(self.expansion * channels))
            found = {float((strength / counts).max()): counts}
        else:
            found = thinned(disassemblies(strength, int(self.most * channels)), self.tried)
        if not self.merge:
            return {threshold: Reassembly.apart(evened(strength, copies)) for threshold, copies in found.items()}
        gram = context.gram(lambda x: x).total
        distance = merge_distance(gram, context.stacked_weight(), self.distance)
        candidates = {}
        for threshold, copies in found.items():
            split = copies > 1
            extra = int(copies.sum()) - channels
            if extra <= mergeable(split):
                candidates[threshold] = Reassembly(copies, merge_groups(distance, split, extra))
        return candidates

    def _losses(self, context: SiteContext, candidates: Mapping[float, Reassembly]) -> dict[float, float]:
        """What each costs, seen from the site as it is: inputs divided, weights multiplied."""
        quantizer = Quantizer(IntegerGrid(self.weight_bits), None, AbsMax())
        output = LinearOutput(context, self.chunks) if context.site.norm is None else ModuleOutput(context, self.chunks)
        losses = {}
        for threshold, candidate in candidates.items():
            scheme, divisor = candidate.scheme(self.bits), candidate.divisor.float()
            rounded = {
                name: rtn(scheme.fold(weight * divisor), quantizer).quantized.decode()
                for name, weight in context.weights.items()
            }
            losses[threshold] = output.loss(rounded, lambda x, s=scheme, d=divisor: s.values(x / d))  # type: ignore[misc]
        return losses


def can_divide(site: Site) -> bool:
    """Whether every channel can be divided by a number of its own in front of the site."""
    if site.norm is not None:
        return True
    return site.producer is not None and len(set(site.producer.channel)) == site.width


def mergeable(split: Tensor) -> int:
    """How many slots merging can save, given which channels are split (channels,)."""
    whole = ~split
    return int(whole[0::2].sum()) if bool(whole[1::2].any()) else 0


def evened(strength: Tensor, copies: Tensor) -> Tensor:
    """Copies with one more for the strongest slot if the width is odd: two 4-bit codes share a byte."""
    if int(copies.sum()) % 2 == 0:
        return copies
    copies = copies.clone()
    copies[torch.argmax(strength / copies)] += 1
    return copies


def thinned(found: Mapping[float, Tensor], count: int) -> dict[float, Tensor]:
    """About `count` entries, the first and the last among them, denser where few slots are added; 0 = all."""
    keys = list(found)
    if 0 < count < len(keys):
        last = len(keys) - 1
        places = {0, *(round(last ** (number / (count - 1))) for number in range(1, count))}
        keys = [keys[place] for place in sorted(places)]
    return {key: found[key] for key in keys}
