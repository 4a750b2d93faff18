"""Second-level statistics: scales and zero points that are quantized themselves (SpQR, arXiv 2306.03078, section 4).

The scales of one column group in `tile` neighbouring rows share a grid: step and zero in 16 bits, a code of a few bits
for each row; so do the zero points. A group of 16 then costs 6 bits and its share of 64, instead of 32.

    scale = step_of_scales * (scale_code - zero_of_scales)        the same for zero points
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids.integer import IntegerGrid

__all__ = ["SecondLevel", "decode_statistics", "encode_statistics", "tiles_of"]

MOST_STATISTIC_BITS = 4  # a scale's code and a zero point's share a byte in kernels
NARROW = torch.float16
SMALLEST_STEP, LARGEST_STATISTIC = 6e-8, 65504.0  # of a float16
SMALLEST_SPREAD = 2.0**-10  # of a step, relative to the largest value: beyond it zeros would lose their digits


@dataclass(frozen=True)
class SecondLevel:
    """How scales and zero points are quantized.

    Attributes:
        tile: neighbouring rows that share a second-level grid; the last tile may have fewer.
        bits: bits of the code of a scale, and of a zero point.
    """

    tile: int = 16
    bits: int = 3

    def __post_init__(self) -> None:
        if self.tile < 1 or not 2 <= self.bits <= MOST_STATISTIC_BITS:
            raise UsageError(f"second level: tile {self.tile} must be positive, bits {self.bits} 2..4")


def tiles_of(rows: int, tile: int) -> int:
    """Tiles that cover all rows."""
    return -(-rows // tile)


def encode_statistics(values: Tensor, level: SecondLevel) -> tuple[Tensor, Tensor]:
    """Quantize a statistic of all rows (rows, groups).

    Returns:
        Codes uint8 (rows, groups), and steps and zeros float16 (tiles, groups, 2).
    """
    rows, groups = values.shape
    tiles = tiles_of(rows, level.tile)
    last = values[-1:].expand(tiles * level.tile - rows, groups)  # repeats change no range
    tiled = torch.cat([values, last]).reshape(tiles, level.tile, groups)
    low, high = tiled.amin(1), tiled.amax(1)
    grid = IntegerGrid(level.bits)
    spread = torch.maximum(high - low, tiled.abs().amax(1) * SMALLEST_SPREAD) / (grid.high - grid.low)
    step = spread.clamp(SMALLEST_STEP, LARGEST_STATISTIC).to(NARROW)
    zero = (-low / step.float()).clamp(-LARGEST_STATISTIC, LARGEST_STATISTIC).to(NARROW)
    codes = grid.nearest(tiled / step.float()[:, None] + (zero.float()[:, None] + grid.low)) - grid.low
    return codes.to(torch.uint8).reshape(-1, groups)[:rows], torch.stack((step, zero), -1)


def decode_statistics(codes: Tensor, grids: Tensor, tile: int) -> Tensor:
    """Float32 (rows, groups) of codes (rows, groups) and their steps and zeros (tiles, groups, 2)."""
    wide = grids.float().repeat_interleave(tile, 0)[: codes.shape[0]]
    return wide[..., 0] * (codes.float() - wide[..., 1])
