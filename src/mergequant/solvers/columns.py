"""Columns of a weight on a uniform grid: what rounds them one by one, and blocks of them in one kernel on a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.grids.quantizer import nearest_code
from mergequant.ops import backends

__all__ = ["Block", "ColumnQuantizer", "GridColumns", "block_kernel", "usable"]

ColumnQuantizer = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class GridColumns:
    """Rounds column after column by scales that are known beforehand; called as any other callback of a sweep.

    Attributes:
        grid: of the codes.
        scale, zero: (rows, groups); zero None = a symmetric grid.
        width: columns; a group has the same number of neighbours.
    """

    grid: IntegerGrid
    scale: Tensor
    zero: Tensor | None
    width: int
    lines: tuple[Tensor, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        zero = None if self.zero is None else self.zero.t().to(self.scale.dtype).contiguous()
        object.__setattr__(self, "lines", (self.scale.t().contiguous(), zero))

    @property
    def size(self) -> int:
        """Columns of a group."""
        return self.width // self.scale.shape[1]

    def __call__(self, column: int, values: Tensor) -> Tensor:
        """What the codes of a column's values (rows,) stand for."""
        scale, zero = self.lines
        group = column // self.size
        code = nearest_code(self.grid, values / scale[group], None if zero is None else zero[group])
        return self.grid.value(code).mul_(scale[group])


Block = Callable[..., tuple[Tensor, Tensor]]


def block_kernel(rounded: ColumnQuantizer | None, like: Tensor, block: int) -> Block | None:
    """block(numbers, target, factors, before=, pivots=) that fixes the columns of a block at once; None: one by one.

    Args:
        rounded: callback of the sweep; None = nothing is rounded.
        like: tensor of the weight's dtype, on its device.
        block: columns.
    """
    plain = rounded is None or (isinstance(rounded, GridColumns) and type(rounded.grid) is IntegerGrid)
    if not (plain and usable(like)):
        return None
    from mergequant.ops.triton.columns import MOST_COLUMNS, fix_columns

    if block > MOST_COLUMNS:
        return None

    def fix(
        numbers: Sequence[int],
        target: Tensor,
        factors: Tensor,
        before: Tensor | None = None,
        pivots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(rounded, GridColumns):
            return fix_columns(target, factors, before=before, pivots=pivots)
        scale, zero = rounded.lines
        lines = torch.tensor([number // rounded.size for number in numbers], dtype=torch.int32).to(target.device)
        low, high = rounded.grid.low, rounded.grid.high
        return fix_columns(
            target, factors, before=before, pivots=pivots, groups=lines, scale=scale, zero=zero, low=low, high=high
        )

    return fix


def usable(like: Tensor) -> bool:
    """Whether blocks of columns of this dtype, on this device, may go through one kernel."""
    return like.is_cuda and like.dtype == torch.float32 and backends.missing("triton") is None
