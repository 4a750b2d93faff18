"""The power grid: codes are uniform in sign(x) |x|^a, so a < 1 puts more levels near zero (PowerQuant, NUPES).

"Automorphism Search for Non-Uniform Quantization", arXiv 2301.09858; "NUPES: Non-Uniform Post-Training Quantization via
Power Exponent Search", arXiv 2308.05600. With m = 2^(bits-1) - 1 a code c in -m..m stands for

    sign(c) |c|^(1/a) * scale,        scale = absmax / m^(1/a)

Powers are the only functions that map products to products. They do not commute with sums: (w x)^a may not be summed
before the power is undone. With a = 1/2 the values are signed squares, integers, so that a sum of products is an
integer product again: 4-bit codes become 0, 1, 4, ... 49 in int8.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids.integer import IntegerGrid

__all__ = ["LARGEST_EXPONENT", "SMALLEST_EXPONENT", "SQUARES", "PowerGrid", "power_levels"]

SMALLEST_EXPONENT, LARGEST_EXPONENT = 0.2, 1.2
SQUARES = 0.5  # the exponent whose values are squares


@dataclass(frozen=True)
class PowerGrid(IntegerGrid):
    """Symmetric codes of `bits` bits that are powers apart.

    Attributes:
        exponent: a; 1 is the symmetric uniform grid.
        nearest_by: "power" rounds |x|^a (the papers' rule), "value" takes the level that is nearest to x itself, which
            is what solvers need that trust each column to be rounded as well as can be.
    """

    exponent: float = 0.5
    nearest_by: Literal["power", "value"] = "power"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SMALLEST_EXPONENT <= self.exponent <= LARGEST_EXPONENT:
            raise UsageError(
                f"a power grid with exponent {self.exponent}; choose {SMALLEST_EXPONENT}..{LARGEST_EXPONENT}"
            )

    @property
    def low(self) -> int:
        return -self.high

    @property
    def reach(self) -> float:
        return float(power_levels(self.bits, self.exponent)[-1])

    def nearest(self, scaled: Tensor, finer: Tensor | None = None) -> Tensor:
        """As `IntegerGrid.nearest`, of values that are divided by their scale.

        Raises:
            UsageError: `finer` is given: copies of powers do not add up to a finer grid.
        """
        if finer is not None:
            raise UsageError("a power grid cannot be made finer by staggered copies")
        if self.exponent == 1:
            return torch.clamp(torch.round(scaled), self.low, self.high)
        size = scaled.abs()
        if self.nearest_by == "power":
            code = torch.round(size.pow(self.exponent)).clamp_(max=self.high)
        else:
            levels = power_levels(self.bits, self.exponent)[self.high :].to(scaled)
            code = torch.bucketize(size, (levels[1:] + levels[:-1]) / 2).to(scaled.dtype)
        return code.copysign_(scaled)

    def value(self, codes: Tensor) -> Tensor:
        levels = power_levels(self.bits, self.exponent).to(codes)
        return levels[codes.long() + self.high]


@lru_cache(maxsize=256)
def power_levels(bits: int, exponent: float) -> Tensor:
    """Values of the codes -m..m, float32 on the CPU; of 1/a = 1, 2 and 3 they are whole numbers exactly."""
    high = IntegerGrid(bits).high
    codes = torch.arange(-high, high + 1, dtype=torch.float64)
    return codes.abs().pow(1 / exponent).copysign(codes).float()
