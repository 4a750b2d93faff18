"""Rounding without data: zero points that leave few large errors (HQQ)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mergequant.errors import RecipeError
from mergequant.solvers import HalfQuadratic, Solution, half_quadratic
from mergequant.steps.judge import RoundingName
from mergequant.steps.rounding import Round

__all__ = ["RoundHalfQuadratic"]


@dataclass(frozen=True)
class RoundHalfQuadratic(Round):
    """As `round` to the nearest code, with zero points, which may be any number, that HQQ finds; weight-only.

    Attributes:
        norm, penalty, growth, iterations, fit_scales: see `solvers.HalfQuadratic`.
    """

    name: ClassVar[str] = "round_half_quadratic"
    method: RoundingName = "rtn"
    clip: bool = False
    zeros: bool = True
    norm: float = 0.7
    penalty: float = 10.0
    growth: float = 1.01
    iterations: int = 20
    fit_scales: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "rtn" or not self.zeros or self.clip:
            raise RecipeError(
                "round_half_quadratic: it rounds to the nearest code, with zeros and without a clip search"
            )

    def solve(self, weight: Tensor, gram: Tensor | None, group_size: int | None) -> Solution:
        settings = HalfQuadratic(self.norm, self.penalty, self.growth, self.iterations, self.fit_scales)
        return half_quadratic(weight, self.bits, group_size, settings)
