"""Dense groups with zero points, second-level statistics, a column order and outliers: what SpQR and GWQ store."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.grids.bitstream import stream_width
from mergequant.grids.outliers import Outliers
from mergequant.grids.quantizer import QTensor, decode

__all__ = ["SparseTensor", "restore_columns"]


@dataclass(frozen=True)
class SparseTensor(QTensor):
    """Codes in stored column order, statistics as they decode, and what is added to them.

    Attributes:
        codes: int8 (rows, width), position by position: groups are neighbours in this order.
        scale: float32 (rows, groups), as stored: exactly a float16, or decoded from its second level.
        zero: float32 (rows, groups), in signed codes, likewise; None = symmetric codes.
        order: int64 (width,), original column of each position; None = the natural order.
        outliers: what is added, at original columns; None = nothing.
        statistic_codes: uint8 (2, rows, groups), codes of scales and of zeros; None = both are stored in 16 bits.
        statistics: float16 (tiles, groups, 4): step and zero of the scales, step and zero of the zeros.
        tile, statistic_bits: rows that share a second-level grid, and bits of its codes; 0 without.
    """

    zero: Tensor | None = None
    order: Tensor | None = None
    outliers: Outliers | None = None
    statistic_codes: Tensor | None = None
    statistics: Tensor | None = None
    tile: int = 0
    statistic_bits: int = 0

    def decode(self) -> Tensor:
        """Float32 values (rows, width) in the original order of the columns."""
        dense = decode(self.codes.to(self.scale.dtype), self.scale, self.zero)
        dense = restore_columns(dense, self.order)
        return dense if self.outliers is None else self.outliers.add_to(dense)

    def rows(self, start: int, stop: int) -> "SparseTensor":
        """Rows start..stop; with a second level, of whole tiles."""
        own = slice(start, stop)
        tiles = slice(start // self.tile, -(-stop // self.tile)) if self.tile else slice(None)
        return SparseTensor(
            self.codes[own],
            self.scale[own],
            self.grid,
            None if self.zero is None else self.zero[own],
            self.order,
            None if self.outliers is None else self.outliers.rows(start, stop),
            None if self.statistic_codes is None else self.statistic_codes[:, own],
            None if self.statistics is None else self.statistics[tiles],
            self.tile,
            self.statistic_bits,
        )

    def bits_per_element(self) -> float:
        """Stored bits per element, all of them: codes, statistics, order, outliers and their row pointers."""
        rows, width = self.codes.shape
        stored = 8 * rows * stream_width(width, self.grid.bits) + (0 if self.order is None else 16 * width)
        if self.statistics is None:
            stored += 16 * (self.scale.numel() + (0 if self.zero is None else self.zero.numel()))
        else:
            coded = 2 * 8 * rows * stream_width(self.scale.shape[1], self.statistic_bits)
            stored += coded + 16 * self.statistics.numel()
        return (stored + (0 if self.outliers is None else self.outliers.bits)) / self.codes.numel()


def restore_columns(dense: Tensor, order: Tensor | None) -> Tensor:
    """Columns (rows, width) put back from stored order; a copy that may be changed."""
    if order is None:
        return dense.contiguous()
    restored = torch.zeros_like(dense)
    restored[:, order.long()] = dense
    return restored
