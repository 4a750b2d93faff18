"""Quantizers: a grid, a granularity, and how the range is found; and the tensor that they make.

`decode(encode(x))` is the definition of fake quantization in this package.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids.integer import IntegerGrid
from mergequant.grids.packing import container_bits

__all__ = ["AbsMax", "ClipSearch", "QTensor", "Quantizer", "fitting_group"]

SMALLEST_RANGE = 1e-35
SMALLEST_SHARE = 4  # a group is not made smaller than this part of what was asked; then a row has one scale


def fitting_group(width: int, group_size: int) -> int:
    """The group size to use where `group_size` may not divide a row of `width` columns; 0 = a scale per row.

    It is the largest divisor of the width up to `group_size`; 0 if that is the whole row, or less than a quarter of
    what was asked, since scales would take more room than they are worth.
    """
    if group_size <= 0 or group_size >= width:
        return 0
    best = next(size for size in range(group_size, 0, -1) if width % size == 0)
    return best if best * SMALLEST_SHARE >= group_size else 0


@dataclass(frozen=True)
class AbsMax:
    """Range = largest magnitude: nothing is clipped."""


@dataclass(frozen=True)
class ClipSearch:
    """Range = the fraction of absmax with the least sum of |error|^norm (GPTQ's `mse` option).

    Attributes:
        norm: exponent of the error (the reference code uses 2.4).
        steps: number of fractions tried, from 1 downwards in equal steps.
        least: smallest fraction tried.
    """

    norm: float = 2.4
    steps: int = 33
    least: float = 0.36

    def __post_init__(self) -> None:
        if self.norm <= 0 or self.steps < 1 or not 0 < self.least <= 1:
            raise UsageError(f"clip search needs norm > 0, steps >= 1 and 0 < least <= 1, got {self}")

    def fractions(self) -> list[float]:
        """Fractions of absmax to try, largest first."""
        if self.steps == 1:
            return [1.0]
        return [1 - (1 - self.least) * i / (self.steps - 1) for i in range(self.steps)]


@dataclass(frozen=True)
class QTensor:
    """Codes and scales of a matrix.

    Attributes:
        codes: integer codes, int8 (rows, width).
        scale: float32 (rows, groups); a row of `width` codes holds `groups` equal groups.
        grid: the integer grid.
    """

    codes: Tensor
    scale: Tensor
    grid: IntegerGrid

    def decode(self) -> Tensor:
        """Float values (rows, width) in the dtype of the scales."""
        return decode(self.codes.to(self.scale.dtype), self.scale)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Rows start..stop."""
        return QTensor(self.codes[start:stop], self.scale[start:stop], self.grid)

    def bits_per_element(self) -> float:
        """Stored bits per element: codes and scales, in their containers."""
        stored = self.codes.numel() * container_bits(self.grid.bits) + self.scale.numel() * 32
        return stored / self.codes.numel()


@dataclass(frozen=True)
class Quantizer:
    """How a matrix (rows, width) becomes integers: one scale per row, or per group of `group_size` along a row.

    Attributes:
        grid: the integer grid.
        group_size: columns that share a scale; None = the whole row.
        range: `AbsMax()` or `ClipSearch(...)`.
    """

    grid: IntegerGrid
    group_size: int | None = None
    range: AbsMax | ClipSearch = AbsMax()

    def groups(self, width: int) -> int:
        """Number of groups in a row of `width` columns.

        Raises:
            UsageError: the group size does not divide the width.
        """
        if self.group_size is None:
            return 1
        if self.group_size < 1 or width % self.group_size:
            raise UsageError(f"group size {self.group_size} does not divide a row of {width} columns")
        return width // self.group_size

    def find_scale(self, values: Tensor) -> Tensor:
        """Scales (rows, groups), float32, of a matrix (rows, width). Rows of zeros get scale 1."""
        groups = self.groups(values.shape[1])
        grouped = values.float().reshape(values.shape[0], groups, -1)
        absmax = grouped.abs().amax(-1)
        # Below SMALLEST_RANGE a scale would lose its digits or vanish; such a row is zero for all purposes.
        absmax = torch.where(absmax > SMALLEST_RANGE, absmax, torch.full_like(absmax, float(self.grid.high)))
        if isinstance(self.range, AbsMax):
            return absmax / self.grid.high
        best_scale, best_loss = absmax / self.grid.high, torch.full_like(absmax, torch.inf)
        for fraction in self.range.fractions():
            scale = absmax * fraction / self.grid.high  # in this order: a fraction of 1 is `AbsMax` to the last bit
            error = self.grid.nearest(grouped / scale[..., None]).mul_(scale[..., None]).sub_(grouped).abs_()
            loss = _sum_of_powers(error, self.range.norm)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
        return best_scale

    def encode(self, values: Tensor, scale: Tensor | None = None) -> QTensor:
        """Quantize a matrix (rows, width); `scale` (rows, groups) is found when it is not given."""
        scale = self.find_scale(values) if scale is None else scale
        grouped = values.reshape(values.shape[0], scale.shape[1], -1).to(scale.dtype)
        codes = self.grid.nearest(grouped / scale[..., None])
        return QTensor(codes.reshape(values.shape).to(torch.int8), scale, self.grid)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Float values of float codes (rows, width) with scales (rows, groups)."""
    grouped = codes.reshape(codes.shape[0], scale.shape[1], -1)
    return (grouped * scale[..., None]).reshape(codes.shape)


def _sum_of_powers(error: Tensor, norm: float) -> Tensor:
    """Sum over the last axis of error^norm. |e|^2.5 = e^2 sqrt(e) is several times cheaper than a general power."""
    if norm == 2.0:
        return error.square().sum(-1)
    if norm == 2.5:
        return error.square().mul_(error.sqrt()).sum(-1)
    return error.pow(norm).sum(-1)
