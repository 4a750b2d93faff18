"""Weights in the order in which the tensor cores read them.

A tile holds 64 outputs (rows of the weight) by 128 inputs (k). Inside it the bytes lie so that every lane of every warp
loads 16 contiguous bytes and has its whole operand of the matrix instruction in registers: nothing is shuffled between
lanes, neither in shared memory nor after it, and the same bytes serve `wgmma` (a warp group takes the 64 rows) and
`mma.sync` (a warp takes 16 rows). A lane is (g = lane // 4, t = lane % 4); warp w owns rows 16 w .. 16 w + 15.

4 bits, 4096 bytes: [2 chunks of 64 k][4 warps][32 lanes][16 bytes]
    byte b of 32-bit word i: row = 16 w + g + 8 (i % 2), with r = 64 chunk + 16 (i // 2) + 4 t + b
    low nibble: the code at k = r; high nibble: the code at k = r + 32.
    So `word << 4` and `word`, both masked with 0xF0F0F0F0, are four int8 numbers 16 * code of two successive k-steps:
    a weight costs less than half an instruction to unpack, and no sign extension. Kernels sum 16 * code * x and shift
    the exact int32 sum right by 4.
8 bits, 8192 bytes: [4 steps of 32 k][4 warps][32 lanes][16 bytes]
    byte b of word i: the code at row = 16 w + g + 8 (i % 2), k = 32 step + 16 (i // 2) + 4 t + b.

Rows and columns that fill the last tiles are zero codes.

A lane owns rows g and g + 8. Where those are a gate row and its up row (`interleave_rows`), SwiGLU needs no exchange
between lanes either.
"""

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops._validate import require, require_codes

__all__ = ["TILE_ROWS", "TILE_WIDTH", "interleave_rows", "tile_bytes", "tile_shape", "tile_weight", "untile_weight"]

TILE_ROWS = 64
TILE_WIDTH = 128
GROUP = 8  # gate rows, then up rows, of an interleaved pair of groups
WORD = 4  # codes of a 32-bit word; words, not bytes, are moved below: a quarter of the index arithmetic
LOW_NIBBLES = 0x0F0F0F0F


def tile_bytes(weight_bits: int) -> int:
    """Bytes of one tile.

    Raises:
        KernelError: bits other than 4 and 8.
    """
    require(
        weight_bits in (4, 8),
        lambda: f"tiles hold weights of 4 or 8 bits, not {weight_bits}; widen narrower codes to 4",
    )
    return TILE_ROWS * TILE_WIDTH * weight_bits // 8


def tile_shape(outputs: int, width: int, weight_bits: int) -> tuple[int, int, int]:
    """Shape of the tiles of a weight (outputs, width): (row tiles, column tiles, bytes of a tile)."""
    return -(-outputs // TILE_ROWS), -(-width // TILE_WIDTH), tile_bytes(weight_bits)


def tile_weight(codes: Tensor, weight_bits: int) -> Tensor:
    """Put a weight into tiles (see the module for the order of the bytes).

    Args:
        codes: int8 (outputs, width), within `weight_bits` bits; any device.
        weight_bits: 4 or 8.

    Returns:
        uint8 (ceil(outputs / 64), ceil(width / 128), 4096 or 8192), contiguous.

    Raises:
        KernelError: another dtype or shape, or a code that 4 bits do not hold.
    """
    require_codes("tile_weight", "codes", codes)
    require(
        codes.dim() == 2 and codes.numel() > 0,
        lambda: f"tile_weight: codes {tuple(codes.shape)} are not (outputs, width)",
    )
    outputs, width = codes.shape
    rows, columns, size = tile_shape(outputs, width, weight_bits)
    if weight_bits == 4:
        low, high = (int(end) for end in codes.aminmax())
        require(low >= -8 and high <= 7, lambda: f"tile_weight: codes reach {low}..{high}; 4 bits hold -8..7")
    fill = (0, columns * TILE_WIDTH - width, 0, rows * TILE_ROWS - outputs)
    whole = torch.nn.functional.pad(codes, fill) if any(fill) else codes.contiguous()
    words = _words(whole)
    if weight_bits == 4:
        #                  tile row, w, r8, g | tile column, chunk, nibble, i // 2, t
        words = words.view(rows, 4, 2, 8, columns, 2, 2, 2, 4)
        first, second = words[:, :, :, :, :, :, 0], words[:, :, :, :, :, :, 1]
        words = (first & LOW_NIBBLES) | ((second & LOW_NIBBLES) << 4)
    else:
        #                  tile row, w, r8, g | tile column, step, i // 2, t
        words = words.view(rows, 4, 2, 8, columns, 4, 2, 4)
    # To tile row, tile column, chunk or step, w, g, t, i // 2, r8.
    return words.permute(0, 4, 5, 1, 3, 7, 6, 2).contiguous().view(torch.uint8).view(rows, columns, size)


def untile_weight(tiles: Tensor, outputs: int, width: int, weight_bits: int) -> Tensor:
    """Inverse of `tile_weight`: int8 codes (outputs, width).

    Raises:
        KernelError: tiles that are not those of such a weight.
    """
    require(tiles.dtype == torch.uint8, lambda: f"untile_weight: tiles are {tiles.dtype}; pass uint8")
    wanted = tile_shape(outputs, width, weight_bits)
    require(tuple(tiles.shape) == wanted, lambda: f"untile_weight: tiles {tuple(tiles.shape)} are not {wanted}")
    rows, columns, _ = wanted
    words = _words(tiles.contiguous())
    words = words.view(rows, columns, 2 if weight_bits == 4 else 4, 4, 8, 4, 2, 2).permute(0, 3, 7, 4, 1, 2, 6, 5)
    if weight_bits == 4:
        nibbles = words.contiguous().view(torch.int8).view(rows, 4, 2, 8, columns, 2, 2, 4 * WORD)
        # int8 shifts: left pushes the low nibble against the sign, right (arithmetic) extends it.
        codes = torch.stack(((nibbles << 4) >> 4, nibbles >> 4), dim=6)
    else:
        codes = words.contiguous().view(torch.int8)
    return codes.view(rows * TILE_ROWS, columns * TILE_WIDTH)[:outputs, :width].contiguous()


def _words(whole: Tensor) -> Tensor:
    """A contiguous tensor of bytes as int32; a view that starts off a word's boundary is copied."""
    return (whole.clone() if whole.storage_offset() % WORD else whole).view(torch.int32)


def interleave_rows(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of gate and up in groups of 8: gate 0..7, up 0..7, gate 8..15, up 8..15, ...

    Args:
        gate: (ffn, ...), a weight, a scale or a bias; ffn a multiple of 8.
        up: the same shape and dtype.

    Returns:
        (2 ffn, ...): what `tiled_swiglu_quant` wants of its tiles, scale and bias.

    Raises:
        KernelError: shapes or dtypes that differ, or rows that do not fill groups of 8.
    """
    require(
        gate.shape == up.shape,
        lambda: f"interleave_rows: gate {tuple(gate.shape)}, up {tuple(up.shape)}; they must agree",
    )
    require(gate.dtype == up.dtype, lambda: f"interleave_rows: gate is {gate.dtype}, up {up.dtype}; they must agree")
    if gate.dim() == 0 or gate.shape[0] % GROUP:
        raise KernelError(
            f"interleave_rows: {tuple(gate.shape)} has no rows in groups of {GROUP}; pad both with rows of zeros"
        )
    rest = gate.shape[1:]
    pairs = torch.stack((gate.reshape(-1, GROUP, *rest), up.reshape(-1, GROUP, *rest)), dim=1)
    return pairs.reshape(2 * gate.shape[0], *rest)
