"""Two-level integers: int8 per row, and inside these codes 4-bit groups with integer steps (QServe's progressive form).

"QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", arXiv 2405.04532 (digest, step 5):

    w ~ (code - zero) * step * scale

with one float scale per row, and for every group an integer step and an integer zero. The middle level,
(code - zero) * step, is what the int8 GEMM multiplies; it needs no saturation, because codes of the first level keep to
the protective range of +-119: a middle value is at most half a step, 8, away from the code that it stands for.

Codes are stored signed, -8..7, and zeros with them (the paper's are 8 more, both).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import KernelError, UsageError
from mergequant.grids.integer import IntegerGrid
from mergequant.grids.packing import container_bits
from mergequant.grids.quantizer import SMALLEST_RANGE, QTensor

__all__ = [
    "LARGEST_STEP",
    "PROTECTED",
    "TWO_LEVEL_BITS",
    "TwoLevelQuantizer",
    "TwoLevelTensor",
    "fine_codes",
    "middle_codes",
]

TWO_LEVEL_BITS = 4
FINE = IntegerGrid(TWO_LEVEL_BITS)
MIDDLE = IntegerGrid(8)
PROTECTED = 119  # largest magnitude of a first-level code
SPAN = FINE.high - FINE.low  # steps from the lowest code to the highest
LARGEST_STEP = -(-2 * PROTECTED // SPAN)  # 16


@dataclass(frozen=True)
class TwoLevelTensor(QTensor):
    """Codes, integer steps and zeros of groups, and a scale per row; the grid is that of the codes.

    Attributes:
        codes: int8 (rows, width), -8..7.
        scale: float32 (rows, 1), of the middle level.
        group_scale: uint8 (rows, groups), 1..16.
        group_zero: int8 (rows, groups), -8..7.
    """

    group_scale: Tensor
    group_zero: Tensor

    def middle(self) -> Tensor:
        """What the integer GEMM multiplies, int8 (rows, width)."""
        return middle_codes(self.codes, self.group_scale, self.group_zero)

    def decode(self) -> Tensor:
        """Float32 values (rows, width)."""
        return self.middle().to(self.scale.dtype) * self.scale

    def rows(self, start: int, stop: int) -> "TwoLevelTensor":
        """Rows start..stop."""
        own = slice(start, stop)
        return TwoLevelTensor(self.codes[own], self.scale[own], self.grid, self.group_scale[own], self.group_zero[own])

    def bits_per_element(self) -> float:
        """Stored bits per element: codes, steps, zeros and scales."""
        stored = self.codes.numel() * container_bits(self.grid.bits) + 16 * self.group_scale.numel()
        return (stored + 32 * self.scale.numel()) / self.codes.numel()


@dataclass(frozen=True)
class TwoLevelQuantizer:
    """How a matrix (rows, width) becomes two-level integers.

    Attributes:
        group_size: columns that share step and zero; None = the whole row.
        search: take the step of least squared error; else the smallest one that covers the group's range.
    """

    group_size: int | None = None
    search: bool = True

    def encode(self, values: Tensor) -> TwoLevelTensor:
        """Quantize a matrix (rows, width): nearest first-level codes, and the nearest ones of their group.

        Raises:
            UsageError: the group size does not divide the width.
        """
        rows, width = values.shape
        size = self.group_size or width
        if size < 1 or width % size:
            raise UsageError(f"group size {size} does not divide a row of {width} columns")
        absmax = values.float().abs().amax(1, keepdim=True)
        scale = torch.where(absmax > SMALLEST_RANGE, absmax, torch.full_like(absmax, float(PROTECTED))) / PROTECTED
        middle = first_level(values.float(), scale).reshape(rows, -1, size)
        step, zero = self._groups(middle)
        codes = FINE.nearest(middle / step + zero).reshape(rows, width)
        small = [part.squeeze(-1) for part in (step, zero)]
        return TwoLevelTensor(codes.to(torch.int8), scale, FINE, small[0].to(torch.uint8), small[1].to(torch.int8))

    def _groups(self, middle: Tensor) -> tuple[Tensor, Tensor]:
        """Integer steps and zeros, as floats (rows, groups, 1), of first-level codes (rows, groups, size)."""
        low, high = middle.amin(-1, keepdim=True).clamp_max(0), middle.amax(-1, keepdim=True).clamp_min(0)
        covering = torch.ceil((high - low) / SPAN).clamp_min(1)
        if not self.search:
            return covering, _zero(low, covering)
        best, least = covering, torch.full_like(covering, torch.inf)
        for number in range(LARGEST_STEP, 0, -1):
            step = covering.clamp_max(number)
            zero = _zero(low, step)
            loss = (FINE.nearest(middle / step + zero).sub_(zero).mul_(step) - middle).square().sum(-1, keepdim=True)
            better = loss < least
            best, least = torch.where(better, step, best), torch.where(better, loss, least)
        return best, _zero(low, best)


def first_level(values: Tensor, scale: Tensor) -> Tensor:
    """First-level codes, as floats: whole numbers within the protective range."""
    return MIDDLE.nearest(values / scale).clamp_(-PROTECTED, PROTECTED)


def middle_codes(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """(code - zero) * step: int8 (rows, width) of codes (rows, width) with steps and zeros (rows, groups).

    Raises:
        KernelError: a value that no int8 holds, so the weights were not made within the protective range.
    """
    grouped = codes.reshape(codes.shape[0], step.shape[1], -1).to(torch.int16)
    wide = (grouped - zero[..., None]).mul_(step[..., None].to(torch.int16))
    if wide.numel() and not (wide.min() >= MIDDLE.low and wide.max() <= MIDDLE.high):
        raise KernelError(
            f"two-level weights reach {wide.min().item()}..{wide.max().item()}, outside int8: codes, steps and zeros "
            "do not belong together"
        )
    return wide.to(torch.int8).reshape(codes.shape)


def fine_codes(middle: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Inverse of `middle_codes`: int8 codes (rows, width)."""
    grouped = middle.reshape(middle.shape[0], step.shape[1], -1).to(torch.int16)
    codes = torch.div(grouped, step[..., None].to(torch.int16), rounding_mode="floor") + zero[..., None]
    return codes.to(torch.int8).reshape(middle.shape)


def _zero(low: Tensor, step: Tensor) -> Tensor:
    """The code that stands for 0 where the lowest code stands for `low` (<= 0)."""
    return FINE.nearest(FINE.low - low / step)
