"""Compensation: the weights are corrected for what quantizing their input does, before the final rounding."""

from dataclasses import dataclass
from typing import ClassVar

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.solvers import GramSum, least_squares_weight
from mergequant.steps.base import SiteStep

__all__ = ["Compensate"]


@dataclass(frozen=True)
class Compensate(SiteStep):
    """Closed-form ridge least squares per linear (digest, choice F).

    Attributes:
        ridge: pull towards the uncorrected weight, as a share of the mean diagonal of the codes' Gram matrix.
    """

    name: ClassVar[str] = "compensate"
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.ridge <= 0:
            raise RecipeError(f"compensate: ridge {self.ridge} must be positive")

    def run(self, context: SiteContext) -> None:
        scheme = context.scheme
        gram = cross = None
        for chunk in context.chunks():
            values = scheme.values(chunk)
            if gram is None or cross is None:
                gram = GramSum.zeros(values.shape[1], values.shape[1], values.device)
                cross = GramSum.zeros(values.shape[1], chunk.shape[1], values.device)
            gram.add(values)
            cross.add(values, chunk)
        if gram is None or cross is None:
            raise RecipeError(f"{context.name}: compensation needs calibration tokens")
        context.targets = {
            name: least_squares_weight(scheme.fold(weight), weight, gram.total, cross.total, self.ridge)
            for name, weight in context.weights.items()
        }
