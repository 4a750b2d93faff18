"""Codebooks: packing of any width, what indices stand for, bits that are counted."""

import pytest
import torch

from mergequant.errors import KernelError
from mergequant.grids import CodebookTensor, CodedColumns, pack_indices, unpack_indices
from mergequant.grids.codebook import packed_words


def symbols(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))


def coded(vectors: int, columns: int, vector: int, bits: int, residual_bits: int = 0, groups: int = 1) -> CodedColumns:
    entries = (1 << bits) + (1 << residual_bits if residual_bits else 0)
    book = torch.randn(groups, entries, vector, generator=torch.Generator().manual_seed(3)).half()
    return CodedColumns(symbols((vectors, columns), bits + residual_bits), book, bits, residual_bits)


@pytest.mark.parametrize("bits", range(1, 33))
def test_pack_when_any_width_expect_every_symbol_back_and_no_gap(bits: int) -> None:
    for count in (0, 1, 31, 97):
        given = symbols((count,), bits)
        words = pack_indices(given, bits)
        assert words.dtype == torch.int32
        assert words.shape == (-(-count * bits // 32),) == (packed_words(count, bits),)
        assert torch.equal(unpack_indices(words, bits, count), given)
    full = torch.full((5,), (1 << bits) - 1)
    assert torch.equal(unpack_indices(pack_indices(full, bits), bits, 5), full)


def test_pack_when_three_bits_expect_lowest_bit_first_across_words() -> None:
    assert pack_indices(torch.tensor([1, 2, 7]), 3).tolist() == [0b111_010_001]
    assert pack_indices(torch.tensor([0] * 10 + [0b111]), 3).tolist() == [-(1 << 30), 1]


def test_pack_when_symbol_or_width_is_out_of_range_expect_error() -> None:
    with pytest.raises(KernelError, match=r"0\.\.4, outside 0\.\.3"):
        pack_indices(torch.tensor([0, 4]), 2)
    with pytest.raises(KernelError, match=r"1\.\.32"):
        pack_indices(torch.tensor([0]), 33)
    with pytest.raises(KernelError, match="take 2 words"):
        unpack_indices(torch.zeros(1, dtype=torch.int32), 5, 9)


@pytest.mark.parametrize(("vector", "residual_bits", "groups"), [(1, 0, 6), (4, 0, 1), (6, 3, 2), (3, 5, 3)])
def test_decode_when_written_out_expect_the_same_values(vector: int, residual_bits: int, groups: int) -> None:
    part = coded(3, 6, vector, 4, residual_bits, groups)
    outputs = 3 * vector - (vector > 1)
    decoded = part.decode(outputs)
    assert decoded.shape == (outputs, 6)
    for row in range(outputs):
        for column in range(6):
            symbol, book = int(part.symbols[row // vector, column]), part.book[column // (6 // groups)].float()
            value = book[symbol & 15, row % vector]
            if residual_bits:
                value = value + book[16 + (symbol >> 4), row % vector]
            assert decoded[row, column] == value


def test_tensor_when_ordered_expect_columns_in_their_own_places_and_all_bits_counted() -> None:
    parts = coded(5, 4, 4, 3), coded(20, 6, 1, 2, groups=6)
    order = torch.tensor([7, 0, 3, 9, 1, 2, 4, 5, 6, 8])
    weight = CodebookTensor(parts, 20, order)
    assert weight.width == 10
    assert torch.equal(weight.decode()[:, order], torch.cat([part.decode(20) for part in parts], 1))
    indices = 32 * (packed_words(20, 3) + packed_words(120, 2))
    books = 16 * (8 * 4 + 6 * 4)
    assert weight.stored_bits() == indices + books + 10 * 16
    assert weight.bits_per_element() == weight.stored_bits() / 200
    assert weight.oversized
    assert not CodebookTensor((coded(500, 4, 4, 3),), 2000).oversized


def test_bits_when_layer_is_that_of_the_paper_expect_its_figure() -> None:
    """4096 x 4096, vectors of 8, 256 entries: 1.002 bits (VPTQ)."""
    part = CodedColumns(torch.zeros((512, 4096), dtype=torch.int64), torch.zeros((1, 256, 8)).half(), 8)
    assert round(CodebookTensor((part,), 4096).bits_per_element(), 3) == 1.002
