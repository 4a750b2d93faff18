"""The order of the bytes in quantized caches: its written definition, the packers, and single codes put in place."""

import pytest
import torch

from mergequant.errors import KernelError
from mergequant.ops import kv_layout

SHAPES = [(width, bits) for width in (32, 64, 96, 128) for bits in (4, 8)]


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    limit = kv_layout.code_limit(bits)
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def definition(codes: torch.Tensor, bits: int, keys: bool) -> torch.Tensor:
    """Cache bytes of codes (tokens, D), written code by code from the text of the module."""
    tokens, width = codes.shape
    out = torch.zeros(tokens * width * bits // 8, dtype=torch.int64)
    per_word = bits // 4
    for token in range(tokens):
        for channel in range(width):
            if keys:
                step, rest = divmod(channel, 32)
                half, rest = divmod(rest, 16)
                t, j = divmod(rest, 4)
                g = token % 8
                n = token // 8 * (width // 32) * per_word + step * per_word
            else:
                tile, g = divmod(channel, 8)
                half, rest = divmod(token % 32, 16)
                upper, rest = divmod(rest, 8)
                t, odd = divmod(rest, 2)
                j = 2 * upper + odd
                n = token // 32 * (width // 8) * per_word + tile * per_word
            n += half if bits == 8 else 0
            byte = n // 4 * 512 + (4 * g + t) * 16 + n % 4 * 4 + j
            code = int(codes[token, channel])
            out[byte] += (code & 15) << (4 * half) if bits == 4 else code & 255
    return out.to(torch.uint8).view(tokens, -1)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("width", "bits"), SHAPES)
def test_pack_when_compared_with_the_definition_expect_equal_bytes(width: int, bits: int, keys: bool) -> None:
    codes = random_codes(64, width, bits=bits)
    pack = kv_layout.pack_keys if keys else kv_layout.pack_values
    assert torch.equal(pack(codes, bits), definition(codes, bits, keys))


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("width", "bits"), SHAPES)
def test_unpack_when_every_byte_is_random_expect_round_trip(width: int, bits: int, keys: bool) -> None:
    codes = random_codes(2, 3, 128, width, bits=bits)
    pack, unpack = (
        (kv_layout.pack_keys, kv_layout.unpack_keys) if keys else (kv_layout.pack_values, kv_layout.unpack_values)
    )
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, 128, width * bits // 8)
    assert torch.equal(unpack(packed, width, bits), codes)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("width", "bits"), SHAPES)
def test_place_when_all_codes_are_listed_expect_a_bijection(width: int, bits: int, keys: bool) -> None:
    place = kv_layout.key_place if keys else kv_layout.value_place
    token, channel = torch.meshgrid(torch.arange(128), torch.arange(width), indexing="ij")
    byte, shift = place(token, channel, width, bits)
    positions = (byte * 8 + shift).flatten().sort().values
    assert torch.equal(positions, torch.arange(128 * width) * bits)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("width", "bits"), [(64, 4), (128, 8), (128, 4)])
def test_put_codes_when_rows_have_their_own_slots_expect_other_codes_kept(width: int, bits: int, keys: bool) -> None:
    pack = kv_layout.pack_keys if keys else kv_layout.pack_values
    codes = random_codes(2, 3, 128, width, bits=bits)
    cache = pack(codes, bits)
    new = random_codes(2, 3, 19, width, bits=bits, seed=1)
    slots = torch.stack((torch.arange(19) + 7, torch.arange(19) + 50))
    kv_layout.put_codes(cache, new, slots, bits, keys)
    for row in range(2):
        codes[row][:, slots[row]] = new[row]
    assert torch.equal(cache, pack(codes, bits))


def test_quantize_when_values_lie_on_ties_and_outside_expect_even_codes_and_the_clamp() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, 99.0, -99.0]])
    scale = torch.full((6,), 0.5)
    assert kv_layout.quantize(x, scale, 4).tolist() == [[0, 2, 2, 0, 7, -7]]
    assert kv_layout.quantize(x, scale, 8).tolist() == [[0, 2, 2, 0, 127, -127]]


@pytest.mark.parametrize(("width", "bits"), [(80, 4), (0, 8), (64, 5), (64, 16)])
def test_cache_width_when_there_is_no_layout_expect_error_that_says_so(width: int, bits: int) -> None:
    with pytest.raises(KernelError, match="bits"):
        kv_layout.cache_width(width, bits)


def test_packers_when_shapes_do_not_fit_expect_errors() -> None:
    with pytest.raises(KernelError, match="multiple of 64"):
        kv_layout.pack_keys(torch.zeros(32, 64, dtype=torch.int8), 4)
    with pytest.raises(KernelError, match="int8"):
        kv_layout.pack_values(torch.zeros(64, 64), 4)
    with pytest.raises(KernelError, match="uint8"):
        kv_layout.unpack_keys(torch.zeros(64, 64, dtype=torch.uint8), 64, 4)
    with pytest.raises(KernelError, match="uint8"):
        kv_layout.unpack_values(torch.zeros(64, 32, dtype=torch.int8), 64, 4)
