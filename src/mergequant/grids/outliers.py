"""The additive sparse part of a weight: single values, or whole columns, that are added to a dense low-bit part.

What is stored is the value minus what the dense part decodes to, in 16 bits. So the sum is the value, whatever the
dense code at that place stands for (SpQR digest, pitfalls: with a real zero point, a "zero" decodes to something else).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import UsageError

__all__ = ["LARGEST_OUTLIER_WIDTH", "Outliers", "column_numbers", "row_numbers"]

LARGEST_OUTLIER_WIDTH = 1 << 16  # a column's number has 16 bits
COLUMN_MASK = LARGEST_OUTLIER_WIDTH - 1
VALUE_BITS, COLUMN_BITS, POINTER_BITS = 16, 16, 32


@dataclass(frozen=True)
class Outliers:
    """Single values by rows (CSR), or whole columns.

    Attributes:
        columns: int16, the low 16 bits of each value's column (count,).
        values: float16 (count,); of whole columns (rows, count).
        pointers: int32 (rows + 1,), where each row's values begin and end; None for whole columns.
    """

    columns: Tensor
    values: Tensor
    pointers: Tensor | None = None

    @classmethod
    def single(cls, residual: Tensor, mask: Tensor) -> "Outliers":
        """The values of `residual` (rows, width) where `mask` is true.

        Raises:
            UsageError: more columns than 16 bits count.
        """
        _check_width(mask.shape[1])
        counts = torch.cat([torch.zeros(1, dtype=torch.int64, device=mask.device), mask.sum(1).cumsum(0)])
        columns = mask.nonzero()[:, 1].to(torch.int32).to(torch.int16)  # row by row; wraps beyond 32767
        return cls(columns, residual[mask].to(torch.float16), counts.to(torch.int32))

    @classmethod
    def whole(cls, residual: Tensor, columns: Tensor) -> "Outliers":
        """The columns `columns` (count,) of `residual` (rows, width). Raises UsageError as `single`."""
        _check_width(residual.shape[1])
        return cls(columns.to(torch.int32).to(torch.int16), residual[:, columns].to(torch.float16).contiguous())

    @property
    def count(self) -> int:
        """Values, or whole columns."""
        return self.columns.shape[0]

    @property
    def bits(self) -> int:
        """Stored bits, all of them."""
        pointers = 0 if self.pointers is None else self.pointers.numel()
        return self.values.numel() * VALUE_BITS + self.count * COLUMN_BITS + pointers * POINTER_BITS

    def add_to(self, dense: Tensor) -> Tensor:
        """Add the values to a dense weight (rows, width), in place."""
        columns = column_numbers(self.columns)
        if self.pointers is None:
            dense[:, columns] += self.values.to(dense.dtype)
            return dense
        rows = row_numbers(self.pointers)
        dense[rows, columns] += self.values.to(dense.dtype)
        return dense

    def rows(self, start: int, stop: int) -> "Outliers":
        """Rows start..stop."""
        if self.pointers is None:
            return Outliers(self.columns, self.values[start:stop])
        first, last = (int(self.pointers[place]) for place in (start, stop))
        return Outliers(self.columns[first:last], self.values[first:last], self.pointers[start : stop + 1] - first)


def column_numbers(columns: Tensor) -> Tensor:
    """int64 columns of stored ones."""
    return columns.to(torch.int64) & COLUMN_MASK


def row_numbers(pointers: Tensor) -> Tensor:
    """int64 row of each value (count,), of the pointers (rows + 1,)."""
    counts = pointers.diff().to(torch.int64)
    return torch.repeat_interleave(torch.arange(counts.shape[0], device=pointers.device), counts)


def _check_width(width: int) -> None:
    if width > LARGEST_OUTLIER_WIDTH:
        raise UsageError(f"outliers of {width} columns: a column's number has 16 bits; the most is 65536 columns")
