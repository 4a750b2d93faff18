"""Tiles against their written definition, and there and back."""

import numpy as np
import pytest
import torch

from mergequant.errors import KernelError
from mergequant.ops import tiles

SHAPES = [(64, 128), (1, 1), (63, 127), (65, 129), (128, 256), (200, 192), (8, 1040), (130, 17)]


def random_codes(outputs: int, width: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs * 1000 + width + bits)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (outputs, width), generator=generator, dtype=torch.int8)


def defined(codes: np.ndarray, bits: int) -> np.ndarray:
    """The module's definition, one byte at a time."""
    outputs, width = codes.shape
    rows, columns, size = tiles.tile_shape(outputs, width, bits)
    whole = np.zeros((rows * 64, columns * 128), dtype=np.int64)
    whole[:outputs, :width] = codes
    result = np.zeros((rows, columns, size), dtype=np.uint8)
    for position in range(size):
        byte, word = position % 4, position // 4 % 4
        lane, warp, part = position // 16 % 32, position // 512 % 4, position // 2048
        group, thread = lane // 4, lane % 4
        row = 16 * warp + group + 8 * (word % 2)
        inner = 16 * (word // 2) + 4 * thread + byte
        if bits == 4:
            low = whole[row::64, 64 * part + inner :: 128]
            high = whole[row::64, 64 * part + inner + 32 :: 128]
            value = (low & 15) | ((high & 15) << 4)
        else:
            value = whole[row::64, 32 * part + inner :: 128] & 255
        result[:, :, position] = value
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "width"), SHAPES)
def test_tiles_when_any_shape_expect_the_written_definition(outputs: int, width: int, bits: int) -> None:
    codes = random_codes(outputs, width, bits)
    made = tiles.tile_weight(codes, bits)
    assert made.is_contiguous()
    np.testing.assert_array_equal(made.numpy(), defined(codes.numpy(), bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "width"), SHAPES)
def test_tiles_there_and_back_expect_the_same_codes(outputs: int, width: int, bits: int) -> None:
    codes = random_codes(outputs, width, bits)
    back = tiles.untile_weight(tiles.tile_weight(codes, bits), outputs, width, bits)
    assert back.dtype == torch.int8
    assert back.is_contiguous()
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_when_every_code_stands_at_every_place_expect_it_back(bits: int) -> None:
    """Exhaustive: each place of a tile in turn meets each code, with its neighbours holding others."""
    half = 1 << (bits - 1)
    places = torch.arange(64 * 128).view(64, 128)
    for shift in range(2 * half):
        codes = ((places * 37 + shift) % (2 * half) - half).to(torch.int8)
        assert torch.equal(tiles.untile_weight(tiles.tile_weight(codes, bits), 64, 128, bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_when_the_weight_is_a_view_expect_its_values(bits: int) -> None:
    codes = random_codes(260, 130, bits)[3:200, 1:129]
    assert torch.equal(tiles.tile_weight(codes, bits), tiles.tile_weight(codes.clone(), bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_when_memory_starts_off_a_word_expect_its_values(bits: int) -> None:
    codes = random_codes(1, 64 * 128 + 3, bits).view(-1)[3:].view(64, 128)
    made = tiles.tile_weight(codes, bits)
    shifted = torch.cat((made.new_zeros(1), made.view(-1)))[1:].view(made.shape)
    assert torch.equal(tiles.untile_weight(shifted, 64, 128, bits), codes)


def test_masked_words_are_sixteen_times_the_codes() -> None:
    """What kernels rely on: both masks of a 4-bit word are int8 numbers 16 * code, nothing else is needed."""
    codes = random_codes(64, 128, 4)
    words = tiles.tile_weight(codes, 4).numpy().view(np.uint32).reshape(2, 4, 8, 4, 4)
    low = ((words << np.uint32(4)) & np.uint32(0xF0F0F0F0)).astype(np.uint32)
    high = (words & np.uint32(0xF0F0F0F0)).astype(np.uint32)
    chunk, warp, group, thread, word = 1, 2, 5, 3, 3
    row, first = 16 * warp + group + 8, 64 * chunk + 16 + 4 * thread
    for value, start in ((low, first), (high, first + 32)):
        seen = value[chunk, warp, group, thread, word : word + 1].view(np.int8)
        assert seen.tolist() == [16 * int(code) for code in codes[row, start : start + 4]]


def test_interleave_when_rows_fill_groups_expect_gate_and_up_in_turn() -> None:
    gate, up = torch.arange(24), torch.arange(100, 124)
    expected = [*range(8), *range(100, 108), *range(8, 16), *range(108, 116), *range(16, 24), *range(116, 124)]
    assert tiles.interleave_rows(gate, up).tolist() == expected
    wide = tiles.interleave_rows(gate[:, None].expand(24, 3), up[:, None].expand(24, 3))
    assert wide.shape == (48, 3)
    assert wide[:, 2].tolist() == expected


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: tiles.tile_weight(torch.zeros(4, 4), 4), "int8"),
        (lambda: tiles.tile_weight(torch.zeros(4, dtype=torch.int8), 4), "outputs, width"),
        (lambda: tiles.tile_weight(torch.zeros(0, 4, dtype=torch.int8), 4), "outputs, width"),
        (lambda: tiles.tile_weight(torch.zeros(4, 4, dtype=torch.int8), 5), "4 or 8"),
        (lambda: tiles.tile_weight(torch.full((4, 4), 8, dtype=torch.int8), 4), "-8..7"),
        (lambda: tiles.untile_weight(torch.zeros(1, 1, 4096), 64, 128, 4), "uint8"),
        (lambda: tiles.untile_weight(torch.zeros(1, 1, 4096, dtype=torch.uint8), 64, 129, 4), r"\(1, 2, 4096\)"),
        (lambda: tiles.untile_weight(torch.zeros(1, 1, 4096, dtype=torch.uint8), 64, 128, 8), r"\(1, 1, 8192\)"),
        (lambda: tiles.interleave_rows(torch.zeros(12), torch.zeros(12)), "groups of 8"),
        (lambda: tiles.interleave_rows(torch.zeros(8), torch.zeros(16)), "agree"),
        (lambda: tiles.interleave_rows(torch.zeros(8), torch.zeros(8).half()), "agree"),
    ],
)
def test_tiles_when_an_argument_is_wrong_expect_error_that_says_so(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KernelError, match=word):
        make()
