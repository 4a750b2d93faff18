"""Codes of any width in a row of bits: true storage, where `packing` gives every code a nibble or a byte.

Layout: code k takes the bits k * bits .. (k + 1) * bits - 1 of its row, low bits first, so eight codes fill `bits`
bytes; a row ends on a whole byte. At 4 bits that is two codes a byte, low nibble first.
"""

import torch
from torch import Tensor

from mergequant.errors import KernelError

__all__ = ["pack_stream", "stream_width", "unpack_stream"]

MOST_BITS = 32
NARROW_BITS = 16  # up to here a code shifted by less than a byte, and its neighbours, fit int32
BYTE = 8


def stream_width(width: int, bits: int) -> int:
    """Bytes that a row of `width` codes of `bits` bits takes."""
    return -(-width * bits // BYTE)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack whole numbers 0 .. 2^bits - 1 (..., width) into uint8 (..., stream_width).

    Raises:
        KernelError: a width of codes that is not 1..32, or a code outside its range.
    """
    _check_bits(bits)
    if codes.numel() and not (codes.min() >= 0 and codes.max() < 1 << bits):
        raise KernelError(f"codes reach {codes.min().item()}..{codes.max().item()}, outside 0..{(1 << bits) - 1}")
    width = codes.shape[-1]
    eights = -(-width // BYTE)
    work = _work_dtype(bits)
    wide = torch.nn.functional.pad(codes.to(work), (0, eights * BYTE - width)).unflatten(-1, (eights, BYTE))
    packed = torch.zeros((*wide.shape[:-1], bits), dtype=work, device=codes.device)
    for number in range(BYTE):
        byte, shift = divmod(number * bits, BYTE)
        rest = wide[..., number] << shift
        while byte < bits:
            packed[..., byte] |= rest & 0xFF
            rest, byte = rest >> BYTE, byte + 1
    return packed.to(torch.uint8).flatten(-2)[..., : stream_width(width, bits)].contiguous()


def unpack_stream(packed: Tensor, width: int, bits: int) -> Tensor:
    """Inverse of `pack_stream`: uint8 (..., stream_width) to (..., width), int32, or int64 of codes above 16 bits.

    Raises:
        KernelError: a width of codes that is not 1..32, or another number of bytes.
    """
    _check_bits(bits)
    if packed.shape[-1] != stream_width(width, bits):
        raise KernelError(f"{packed.shape[-1]} bytes hold no {width} codes of {bits} bits; pass {width * bits} bits")
    eights = -(-width // BYTE)
    wide = torch.nn.functional.pad(packed, (0, eights * bits - packed.shape[-1])).unflatten(-1, (eights, bits))
    wide = wide.to(_work_dtype(bits))
    codes = torch.empty((*wide.shape[:-1], BYTE), dtype=wide.dtype, device=packed.device)
    for number in range(BYTE):
        byte, shift = divmod(number * bits, BYTE)
        value, have = wide[..., byte] >> shift, BYTE - shift
        while have < bits:
            byte += 1
            value = value | (wide[..., byte] << have)
            have += BYTE
        codes[..., number] = value & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :width]


def _work_dtype(bits: int) -> torch.dtype:
    return torch.int32 if bits <= NARROW_BITS else torch.int64


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MOST_BITS:
        raise KernelError(f"codes of {bits} bits have no stream; choose 1..{MOST_BITS}")
