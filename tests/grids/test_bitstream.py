"""Rows of bits: every width survives, takes exactly its bytes, and 4 bits lie as nibbles do."""

import pytest
import torch

from mergequant.errors import KernelError
from mergequant.grids import pack_codes, pack_stream, stream_width, unpack_stream


@pytest.mark.parametrize("bits", range(1, 33))
@pytest.mark.parametrize("width", [1, 7, 8, 16, 53])
def test_stream_expect_codes_back_and_no_byte_more(bits: int, width: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, width), generator=torch.Generator().manual_seed(bits))
    packed = pack_stream(codes, bits)
    assert packed.shape == (2, 3, -(-width * bits // 8)) == (2, 3, stream_width(width, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_stream(packed, width, bits).long(), codes)


def test_stream_when_4_bits_expect_the_order_of_nibbles() -> None:
    codes = torch.randint(-8, 8, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(pack_stream(codes.int() & 15, 4), pack_codes(codes, 4))


def test_stream_when_wrong_expect_error() -> None:
    with pytest.raises(KernelError, match=r"0\.\.8, outside 0\.\.7"):
        pack_stream(torch.arange(9), 3)
    with pytest.raises(KernelError, match="33 bits"):
        pack_stream(torch.arange(9), 33)
    with pytest.raises(KernelError, match="4 bytes hold no 8 codes"):
        unpack_stream(torch.zeros(2, 4, dtype=torch.uint8), 8, 3)
