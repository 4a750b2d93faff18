"""Packing: codes in, bytes out, the same codes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergequant.errors import KernelError, UsageError
from mergequant.grids import IntegerGrid, container_bits, pack_codes, packed_width, unpack_codes

ALL_BITS = (2, 3, 4, 5, 6, 7, 8)


def test_pack_codes_when_all_pairs_of_int4_expect_every_byte_once_and_the_documented_nibbles() -> None:
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8))
    packed = pack_codes(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.shape == (256, 1)
    assert packed.unique().numel() == 256
    expected = [(low & 15) + 16 * (high & 15) for low, high in codes.tolist()]
    assert packed.flatten().tolist() == expected
    assert torch.equal(unpack_codes(packed, 4), codes.to(torch.int8))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_pack_codes_when_every_code_of_a_grid_expect_round_trip(bits: int, dtype: torch.dtype) -> None:
    grid = IntegerGrid(bits)
    codes = torch.arange(grid.low, grid.high + 1).repeat(3, 1)
    packed = pack_codes(codes.to(dtype), bits)
    assert packed.shape == (3, packed_width(codes.shape[1], bits))
    assert packed.element_size() == 1
    assert torch.equal(unpack_codes(packed, bits), codes.to(torch.int8))


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    half=st.integers(0, 33),
    bits=st.sampled_from(ALL_BITS),
    seed=st.integers(0, 99),
)
def test_pack_codes_when_any_shape_expect_round_trip(leading: list[int], half: int, bits: int, seed: int) -> None:
    grid = IntegerGrid(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.low, grid.high + 1, (*leading, 2 * half), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*leading, 2 * half * container_bits(bits) // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_pack_codes_when_not_contiguous_expect_same_as_contiguous() -> None:
    codes = torch.randint(-8, 8, (6, 10), dtype=torch.int8).t()
    assert torch.equal(pack_codes(codes, 4), pack_codes(codes.contiguous(), 4))


def test_pack_codes_when_odd_width_expect_refused_at_4_bits_and_taken_at_8() -> None:
    codes = torch.zeros(2, 5, dtype=torch.int8)
    with pytest.raises(KernelError, match="pad the width"):
        pack_codes(codes, 4)
    assert pack_codes(codes, 8).shape == (2, 5)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_pack_codes_when_one_code_is_outside_the_grid_expect_error(bits: int, beyond: int) -> None:
    grid = IntegerGrid(bits)
    codes = torch.zeros(2, 4, dtype=torch.int32)
    codes[1, 2] = grid.low - 1 if beyond < 0 else grid.high + 1
    with pytest.raises(KernelError, match=f"outside int{bits}"):
        pack_codes(codes, bits)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_pack_codes_when_a_code_is_not_a_whole_number_expect_error(value: float) -> None:
    codes = torch.zeros(2, 4)
    codes[0, 1] = value
    with pytest.raises(KernelError):
        pack_codes(codes, 4)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_integer_grid_when_bits_unknown_expect_error(bits: int) -> None:
    with pytest.raises(UsageError, match=str(bits)):
        IntegerGrid(bits)
    with pytest.raises(UsageError, match=str(bits)):
        pack_codes(torch.zeros(2, 4), bits)
