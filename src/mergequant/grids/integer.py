"""The integer grid: the one place in the package where a value is rounded to a code.

Every fake quantization, every solver and every reference op calls `IntegerGrid.nearest`; nothing else rounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError

__all__ = ["IntegerGrid"]

SUPPORTED_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class IntegerGrid:
    """Signed integers of `bits` bits in two's complement: -2^(bits-1) .. 2^(bits-1)-1.

    The grid is symmetric in the field's sense (no zero-point): a scale is `range / high`, and the one extra negative
    code is used by rounding and clipping only (QuaRot's signed convention; MergeQuant digest, "integers in [-8, 7]").
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UsageError(f"an integer grid of {self.bits} bits does not exist here; choose one of {SUPPORTED_BITS}")

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code; a symmetric scale is absmax / high."""
        return (1 << (self.bits - 1)) - 1

    @property
    def reach(self) -> float:
        """Value of the largest code; a symmetric scale is absmax / reach."""
        return self.high

    def value(self, codes: Tensor) -> Tensor:
        """What codes stand for before they are scaled, in their floating dtype: themselves, on this grid."""
        return codes

    def nearest(self, scaled: Tensor, finer: Tensor | None = None) -> Tensor:
        """Round values that are already divided by their scale to codes, kept in `scaled`'s floating dtype.

        Ties go to the even code, as in `torch.round` and in the GPU's convert instruction. `finer` multiplies the
        bounds: the grid of several staggered copies that are summed.
        """
        if finer is None:
            return torch.clamp(torch.round(scaled), self.low, self.high)
        return torch.clamp(torch.round(scaled), self.low * finer, self.high * finer)

    def share_outside(self, scaled: Tensor) -> float:
        """Share of values whose nearest integer lies beyond the grid."""
        nearest = torch.round(scaled)
        return float(((nearest > self.high) | (nearest < self.low)).float().mean())
