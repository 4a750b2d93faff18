"""Quantizers: a grid, a granularity, and how the range is found; and the tensor that they make.

`decode(encode(x))` is the definition of fake quantization in this package.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids.integer import IntegerGrid
from mergequant.grids.packing import container_bits

__all__ = ["AbsMax", "ClipSearch", "QTensor", "Quantizer", "ZeroTensor", "fitting_group"]

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
        return decode(self.grid.value(self.codes.to(self.scale.dtype)), self.scale)

    def rows(self, start: int, stop: int) -> "QTensor":
        """Rows start..stop."""
        return QTensor(self.codes[start:stop], self.scale[start:stop], self.grid)

    def bits_per_element(self) -> float:
        """Stored bits per element: codes and scales, in their containers."""
        stored = self.codes.numel() * container_bits(self.grid.bits) + self.scale.numel() * 32
        return stored / self.codes.numel()


@dataclass(frozen=True)
class ZeroTensor(QTensor):
    """Codes with scales and zero points: a value is (code - zero) * scale.

    Attributes:
        zero: the code that stands for 0 in each group (rows, groups), int8 and a code itself; or any number, float16.
    """

    zero: Tensor

    def decode(self) -> Tensor:
        return decode(self.codes.to(self.scale.dtype), self.scale, self.zero)

    def rows(self, start: int, stop: int) -> "ZeroTensor":
        own = slice(start, stop)
        return ZeroTensor(self.codes[own], self.scale[own], self.grid, self.zero[own])

    def bits_per_element(self) -> float:
        return super().bits_per_element() + self.zero.numel() * self.zero.itemsize * 8 / self.codes.numel()


@dataclass(frozen=True)
class Quantizer:
    """How a matrix (rows, width) becomes integers: one scale per row, or per group of `group_size` along a row.

    Attributes:
        grid: the integer grid.
        group_size: columns that share a scale; None = the whole row.
        range: `AbsMax()` or `ClipSearch(...)`.
        zeros: an integer zero point for every scale: the grid reaches from a group's smallest value to its largest, 0
            included, instead of to the largest magnitude on both sides.
    """

    grid: IntegerGrid
    group_size: int | None = None
    range: AbsMax | ClipSearch = AbsMax()
    zeros: bool = False

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
        return self.find(values)[0]

    def find(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `find_scale`, and the zero points, int8 (rows, groups); None without `zeros`."""
        groups = self.groups(values.shape[1])
        grouped = values.float().reshape(values.shape[0], groups, -1)
        low = grouped.amin(-1).clamp_max(0)
        reach, steps = grouped.abs().amax(-1), self.grid.reach
        if self.zeros:
            reach, steps = grouped.amax(-1).clamp_min(0) - low, self.grid.high - self.grid.low
        # Below SMALLEST_RANGE a scale would lose its digits or vanish; such a row is zero for all purposes.
        reach = torch.where(reach > SMALLEST_RANGE, reach, torch.full_like(reach, float(steps)))
        best_scale, best_loss = reach / steps, torch.full_like(reach, torch.inf)
        zero = self.grid.nearest(self.grid.low - low / best_scale) if self.zeros else None  # for any fraction
        whole = None if zero is None else zero.to(torch.int8)
        if isinstance(self.range, AbsMax):
            return best_scale, whole
        for fraction in self.range.fractions():
            scale = reach * fraction / steps  # in this order: a fraction of 1 is `AbsMax` to the last bit
            nearest = self.grid.value(
                nearest_code(self.grid, grouped / scale[..., None], None if zero is None else zero[..., None])
            )
            error = nearest.mul_(scale[..., None]).sub_(grouped).abs_()
            loss = _sum_of_powers(error, self.range.norm)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
        return best_scale, whole

    def encode(self, values: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> QTensor:
        """Quantize a matrix (rows, width); `scale` and `zero` (rows, groups) are found when no scale is given."""
        if scale is None:
            scale, zero = self.find(values)
        grouped = values.reshape(values.shape[0], scale.shape[1], -1).to(scale.dtype) / scale[..., None]
        if zero is None:
            return QTensor(self.grid.nearest(grouped).reshape(values.shape).to(torch.int8), scale, self.grid)
        codes = self.grid.nearest(grouped + zero[..., None])
        return ZeroTensor(codes.reshape(values.shape).to(torch.int8), scale, self.grid, zero)


def nearest_code(grid: IntegerGrid, scaled: Tensor, zero: Tensor | None) -> Tensor:
    """Nearest code less its zero point, as floats, of values that are divided by their scale."""
    return grid.nearest(scaled) if zero is None else grid.nearest(scaled + zero).sub_(zero)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Float values of float codes (rows, width) with scales, and zero points if there are any (rows, groups)."""
    grouped = codes.reshape(codes.shape[0], scale.shape[1], -1)
    if zero is not None:
        grouped = grouped - zero[..., None].to(scale.dtype)
    return (grouped * scale[..., None]).reshape(codes.shape)


def _sum_of_powers(error: Tensor, norm: float) -> Tensor:
    """Sum over the last axis of error^norm. |e|^2.5 = e^2 sqrt(e) is several times cheaper than a general power."""
    if norm == 2.0:
        return error.square().sum(-1)
    if norm == 2.5:
        return error.square().mul_(error.sqrt()).sum(-1)
    return error.pow(norm).sum(-1)
