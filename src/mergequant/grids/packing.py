"""Packed storage of integer codes.

Layout: codes lie along the last axis. At 4 bits two neighbours share a byte, the lower index in the low nibble, each a
two's complement number of four bits; an odd width is refused, because a silent pad would hide one column. Narrower
codes take a nibble each too, wider ones a byte.
"""

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.grids.integer import IntegerGrid

__all__ = ["container_bits", "pack_codes", "packed_width", "unpack_codes"]

NIBBLE_BITS = 4
NIBBLE_MASK = 0x0F
NIBBLE_SIGN = 0x08


def container_bits(bits: int) -> int:
    """Bits that one stored code takes: 4 up to int4, else 8."""
    return NIBBLE_BITS if bits <= NIBBLE_BITS else 8


def packed_width(width: int, bits: int) -> int:
    """Bytes that `width` codes of `bits` bits take.

    Raises:
        KernelError: an odd number of 4-bit codes.
    """
    if container_bits(bits) == 8:
        return width
    if width % 2:
        raise KernelError(f"{width} codes of {bits} bits do not fill whole bytes; pad the width to an even number")
    return width // 2


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes (..., width) of any integer or float dtype into bytes (..., packed_width).

    Returns uint8 for two codes a byte, int8 for one.

    Raises:
        KernelError: a code lies outside the grid or is not whole, or an odd number of 4-bit codes.
    """
    grid = IntegerGrid(bits)
    # Written so that NaN, which compares false with everything, is refused too.
    if codes.numel() and not (codes.min() >= grid.low and codes.max() <= grid.high):
        raise KernelError(
            f"codes reach {codes.min().item()}..{codes.max().item()}, outside int{bits} {grid.low}..{grid.high}"
        )
    packed_width(codes.shape[-1], bits)
    narrow = codes.to(torch.int8)
    if codes.is_floating_point() and not torch.equal(narrow.to(codes.dtype), codes):
        raise KernelError("codes are not whole numbers; round them with `IntegerGrid.nearest` first")
    if container_bits(bits) == 8:
        return narrow.contiguous()
    nibbles = narrow.view(torch.uint8) & NIBBLE_MASK
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << NIBBLE_BITS)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: bytes (..., packed_width) to int8 codes (..., width)."""
    if container_bits(bits) == 8:
        return packed.view(torch.int8) if packed.dtype == torch.uint8 else packed
    nibbles = torch.stack((packed & NIBBLE_MASK, packed >> NIBBLE_BITS), dim=-1).flatten(-2)
    # Sign extension of a 4-bit number: flip the sign bit, then subtract its weight.
    return (nibbles ^ NIBBLE_SIGN).to(torch.int8) - NIBBLE_SIGN
