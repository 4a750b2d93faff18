"""Rows of a weight that live in tiles of somebody else: fused q/k/v, or gate and up in turn.

The runtime fuses layers that read one tensor into one set of tiles. `TiledRows` is what such a layer keeps instead of
its own codes: the common tiles, and which of their rows are its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.ops.tiles import TILE_ROWS, tile_shape

__all__ = ["TiledRows"]


@dataclass(frozen=True, eq=False)
class TiledRows:
    """Some rows of tiled weights.

    Attributes:
        tiles: uint8 (row tiles, column tiles, bytes of a tile): all that lies between the first and the last own row.
        rows: int64 (outputs,), places of the own rows in `tiles`, on its device.
        start: first own row if they follow one another, else None.
        width: columns of the weight.
        bits: 4 or 8, of a code in the tiles.
    """

    tiles: Tensor
    rows: Tensor
    start: int | None
    width: int
    bits: int

    @classmethod
    def of(cls, tiles: Tensor, rows: Tensor | slice, outputs: int, width: int, bits: int) -> "TiledRows":
        """Describe rows `rows` (places, or a slice without step) of `tiles`.

        Raises:
            KernelError: tiles of another width, or not `outputs` places inside of them.
        """
        count = tiles.shape[0] * TILE_ROWS if tiles.dim() == 3 else 0
        wanted = tile_shape(max(count, 1), width, bits)
        if tiles.dtype != torch.uint8 or tuple(tiles.shape) != wanted:
            found = f"{tiles.dtype} {tuple(tiles.shape)}"
            raise KernelError(f"adopt: tiles are {found}, not uint8 {wanted}, those of {width} inputs at {bits} bits")
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(count))
        places = rows.to(device="cpu", dtype=torch.int64)
        if places.shape != (outputs,) or int(places.min()) < 0 or int(places.max()) >= count:
            raise KernelError(f"adopt: rows {tuple(places.shape)} are not {outputs} places among {count} tiled rows")
        first = int(places.min()) // TILE_ROWS
        own = tiles[first : int(places.max()) // TILE_ROWS + 1]
        places = places - first * TILE_ROWS
        start = int(places[0])
        follow = torch.equal(places, torch.arange(start, start + outputs))
        return cls(own, places.to(tiles.device), start if follow else None, width, bits)

    def codes(self) -> Tensor:
        """The weight, int8 (outputs, width), row-major: a copy."""
        everything = ops.untile_weight(self.tiles, self.tiles.shape[0] * TILE_ROWS, self.width, self.bits)
        return everything.index_select(0, self.rows)

    def linear(
        self,
        codes: Tensor,
        weight_scale: Tensor,
        token_scale: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """`tiled_linear` of the own rows.

        Rows that begin a tile are a weight of their own. Others cost the product with all rows in between: their scales
        are zero, and what comes out is dropped.
        """
        if self.start == 0:
            return ops.tiled_linear(codes, self.tiles, weight_scale, token_scale, bias, self.bits, out_dtype)
        scale, offset = self._spread(weight_scale), None if bias is None else self._spread(bias)
        value = ops.tiled_linear(codes, self.tiles, scale, token_scale, offset, self.bits, out_dtype)
        return value.index_select(-1, self.rows)

    def _spread(self, values: Tensor) -> Tensor:
        """A value per own row (outputs,), in its place among zeros."""
        return values.new_zeros(self.tiles.shape[0] * TILE_ROWS).index_copy_(0, self.rows, values)
