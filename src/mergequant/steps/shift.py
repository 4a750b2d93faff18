"""The step that shifts channels before anything is rounded: OutlierTune's symmetrization, Outlier Suppression+."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.models.roles import SiteKind
from mergequant.steps.base import SiteStep
from mergequant.transforms import middles, without_small

__all__ = ["ShiftChannels"]


@dataclass(frozen=True)
class ShiftChannels(SiteStep):
    """Subtract each channel's middle from what a norm gives; the consumers' biases take W shift in return.

    Put this step before all others, `scale_channels` included: shifts are in the unit of the unscaled channel.

    Attributes:
        rule: "middle": (max + min) / 2 over all calibration tokens (Outlier Suppression+); "mean": the mean over
            windows of each window's (max + min) / 2 (OutlierTune).
        norms: "biased" = only norms that have a bias, which costs nothing at run time; "all" = others get one, which
            costs an addition for every element. A residual stream is shifted in either case, at that cost.
        threshold: shifts below this share of the largest one are left out.
        skip: tokens at the start of each window that are not looked at (BOS may be unlike all others).
    """

    name: ClassVar[str] = "shift_channels"
    sites: tuple[SiteKind, ...] = ("norm", "stream")
    rule: Literal["middle", "mean"] = "middle"
    norms: Literal["biased", "all"] = "all"
    threshold: float = 0.0
    skip: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("middle", "mean"):
            raise RecipeError(f"shift_channels: rule {self.rule!r} is not 'middle' or 'mean'")
        if self.norms not in ("biased", "all"):
            raise RecipeError(f"shift_channels: norms {self.norms!r} is not 'biased' or 'all'")
        if not 0 <= self.threshold <= 1 or self.skip < 0:
            raise RecipeError(
                f"shift_channels: threshold {self.threshold} is outside [0, 1] or skip {self.skip} below 0"
            )

    def run(self, context: SiteContext) -> None:
        shifts = context.can_shift and (self.norms == "all" or context.has_bias)
        context.report(shifted=float(shifts))
        if not shifts:
            return
        low, high, total, windows = self._extremes(context)
        shift = (low + high) / 2 if self.rule == "middle" else total / windows
        shift = without_small(shift, self.threshold)
        context.report(largest_shift=float(shift.abs().max()), shifted_channels=float((shift != 0).sum()))
        context.shift_channels(shift)

    def _extremes(self, context: SiteContext) -> tuple[Tensor, Tensor, Tensor, int]:
        """Lowest and highest value of every channel, the sum of all windows' middles, and the number of windows."""
        low = torch.full((context.site.width,), torch.inf, device=context.block.device)
        high, total, count = -low, torch.zeros_like(low), 0
        for windows in context.windows():
            seen = windows[:, min(self.skip, windows.shape[1] - 1) :]
            low = torch.minimum(low, seen.amin((0, 1)))
            high = torch.maximum(high, seen.amax((0, 1)))
            total += middles(seen).sum(0)
            count += seen.shape[0]
        return low, high, total, count
