"""Order of the bytes in a quantized key or value cache: the order in which the int8 tensor core wants its operand.

A cache of one head is (capacity, D * bits / 8) bytes, D the head width, opaque in that shape. Decode attention
multiplies with `mma.sync.m16n8k32` (int8), whose second operand a warp holds in two 32-bit words per lane. With
lane = (g = lane // 4, t = lane % 4), byte j of those words belongs to column g and to row 4 t + j (word 0) or
16 + 4 t + j (word 1) of the 32 x 8 operand. Caches store exactly those words, lane after lane, so that a warp loads
operands with 16-byte accesses to consecutive addresses and shuffles nothing.

Words. 4 bits: one word holds both, word 0 in its low nibbles and word 1 in its high nibbles (two's complement);
masking gives int8 values 16 * code. 8 bits: two words. Below, `half` is 0 or 1 for the operand's word 0 or 1.

Keys (product q k: rows of the operand are channels, columns are tokens). A group is 8 tokens, one per g.
    channel = 32 step + 16 half + 4 t + j        token = 8 group + g
    word number n (per lane) = group * (D / 32) * (bits / 4) + step * (bits / 4) (+ half at 8 bits)
    address of its byte j = (n // 4) * 512 + lane * 16 + (n % 4) * 4 + j
    All bytes of a key hold only that key: D = 128 at 4 bits is 64 consecutive bytes of a token.

Values (product p v: rows of the operand are tokens, columns are channels). A group is 32 tokens.
    channel = 8 tile + g
    token = 32 group + 16 half + 8 (j // 2) + 2 t + (j % 2)
    word number n = group * (D / 8) * (bits / 4) + tile * (bits / 4) (+ half at 8 bits), address as above.
    The order of the tokens is that in which the first product leaves its results in the lanes: they become the first
    operand of the second product where they are. At 4 bits a byte holds two tokens of one channel, 16 apart: whoever
    writes one token must keep the other, so a group of 32 tokens must have a single writer at a time.

Codes are symmetric: -7..7 at 4 bits, -127..127 at 8. The step of a channel is a float32 of its own, fixed at
calibration, the same for all tokens. The one code that is left over marks a stored token where caches lie in pages
(`kv_pages`): as that of channel 0, in the first bits of the first byte of a head's keys.
"""

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.grids import IntegerGrid
from mergequant.ops._validate import require

__all__ = [
    "CAPACITY_MULTIPLE",
    "KEY_GROUP",
    "VALUE_GROUP",
    "cache_width",
    "code_limit",
    "is_marked",
    "key_place",
    "mark_code",
    "pack_keys",
    "pack_values",
    "put_codes",
    "quantize",
    "unpack_keys",
    "unpack_values",
    "value_place",
]

KEY_GROUP = 8  # tokens: columns of the operand
VALUE_GROUP = 32  # tokens: rows of the operand
CAPACITY_MULTIPLE = 64  # whole groups, and whole chunks of the attention kernels
WIDTH_MULTIPLE = 32
LANE_BYTES = 16
UNIT_BYTES = 32 * LANE_BYTES  # what a warp loads at once
WORD_BYTES = 4


def code_limit(bits: int) -> int:
    """Largest code: 7 or 127."""
    return int(2 ** (bits - 1) - 1)


def mark_code(bits: int) -> int:
    """The code that neither keys nor values have: -8 or -128."""
    return -code_limit(bits) - 1


def is_marked(keys: Tensor, bits: int) -> Tensor:
    """Whether channel 0 of the first token has that code: uint8 (..., tokens, D * bits / 8) to bool (...)."""
    mask = 2**bits - 1
    return keys[..., 0, 0] & mask == mark_code(bits) & mask


def cache_width(head_width: int, bits: int) -> int:
    """Bytes of one token of one head in a quantized cache.

    Raises:
        KernelError: bits other than 4 and 8, or a head width that the order of the bytes does not cover.
    """
    require(
        bits in (4, 8), lambda: f"a quantized cache has 4 or 8 bits, not {bits}; float caches (bits=16) hold plain rows"
    )
    require(
        head_width > 0 and head_width % WIDTH_MULTIPLE == 0,
        lambda: (
            f"head width {head_width} is no multiple of {WIDTH_MULTIPLE}: quantized caches cannot hold it; use bits=16"
        ),
    )
    return head_width * bits // 8


def key_place(token: Tensor, channel: Tensor, head_width: int, bits: int) -> tuple[Tensor, Tensor]:
    """Where the code of a key lies: (byte from the start of the head's cache, shift of its bits in that byte)."""
    step, half, lane_part, j = channel // 32, channel % 32 // 16, channel % 16 // 4, channel % 4
    lane = token % KEY_GROUP * 4 + lane_part
    return _place(token // KEY_GROUP, step, half, lane, j, head_width // 32, bits)


def value_place(token: Tensor, channel: Tensor, head_width: int, bits: int) -> tuple[Tensor, Tensor]:
    """Where the code of a value lies; as `key_place`."""
    half, lane_part, j = token % 32 // 16, token % 8 // 2, token % 16 // 8 * 2 + token % 2
    lane = channel % 8 * 4 + lane_part
    return _place(token // VALUE_GROUP, channel // 8, half, lane, j, head_width // 8, bits)


def _place(
    group: Tensor, operand: Tensor, half: Tensor, lane: Tensor, j: Tensor, operands: int, bits: int
) -> tuple[Tensor, Tensor]:
    word = group * operands + operand
    if bits == 8:
        word = word * 2 + half
        half = torch.zeros_like(half)
    byte = word // 4 * UNIT_BYTES + lane * LANE_BYTES + word % 4 * WORD_BYTES + j
    return byte, half * 4


def put_codes(cache: Tensor, codes: Tensor, slots: Tensor, bits: int, keys: bool) -> None:
    """Write codes of some tokens into a cache, in place; other codes are kept.

    Args:
        cache: uint8 (batch, heads, capacity, D * bits / 8), contiguous.
        codes: int8 (batch, heads, tokens, D).
        slots: int64 (batch, tokens): slot of every token, no two equal within a row.
        bits: 4 or 8.
        keys: whether this is the cache of the keys.
    """
    batch, heads, tokens, width = codes.shape
    place = key_place if keys else value_place
    byte, shift = place(slots[..., None], torch.arange(width, device=codes.device), width, bits)
    flat = cache.view(batch, heads, -1)
    byte = byte.reshape(batch, 1, -1).expand(-1, heads, -1)
    shift = shift.expand(batch, tokens, width).reshape(batch, 1, -1).expand(-1, heads, -1).to(torch.uint8)
    values = codes.reshape(batch, heads, -1).view(torch.uint8)
    if bits == 8:
        flat.scatter_(-1, byte, values)
        return
    # Two codes of a byte may both be new, so nibbles are added as differences: modulo 256 every byte ends up exact.
    old = flat.gather(-1, byte) >> shift & 0x0F
    flat.scatter_add_(-1, byte, ((values & 0x0F) - old) << shift)


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 codes clamp(rint(x * (1 / scale))) of float32 x (..., D); the reciprocal is rounded to float32 first."""
    return IntegerGrid(bits).nearest(x * scale.reciprocal()).clamp_min(-code_limit(bits)).to(torch.int8)


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Key codes int8 (..., tokens, D), tokens a multiple of 64, as cache bytes uint8 (..., tokens, D * bits / 8)."""
    lead, tokens, width = _check_codes(codes, bits)
    # axes: group, g, step, half, t, j; then group, step, (half,) g, t, j
    parts = codes.reshape(-1, tokens // 8, 8, width // 32, 2, 4, 4)
    words = _nibbles(parts.permute(0, 1, 3, 2, 5, 6, 4)) if bits == 4 else parts.permute(0, 1, 3, 4, 2, 5, 6)
    return _units(words).reshape(*lead, tokens, cache_width(width, bits))


def unpack_keys(packed: Tensor, head_width: int, bits: int) -> Tensor:
    """Inverse of `pack_keys`: int8 (..., tokens, D)."""
    lead, tokens = _check_packed(packed, head_width, bits)
    steps = head_width // 32
    words = _words(packed)
    if bits == 4:
        parts = _codes_of(words).reshape(-1, tokens // 8, steps, 8, 4, 4, 2).permute(0, 1, 3, 2, 6, 4, 5)
    else:
        parts = words.view(torch.int8).reshape(-1, tokens // 8, steps, 2, 8, 4, 4).permute(0, 1, 4, 2, 3, 5, 6)
    return parts.reshape(*lead, tokens, head_width)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Value codes int8 (..., tokens, D), tokens a multiple of 64, as cache bytes uint8 (..., tokens, D * bits / 8)."""
    lead, tokens, width = _check_codes(codes, bits)
    # axes: group, half, j // 2, t, j % 2, tile, g; then group, tile, (half,) g, t, j // 2, j % 2
    parts = codes.reshape(-1, tokens // 32, 2, 2, 4, 2, width // 8, 8)
    words = _nibbles(parts.permute(0, 1, 6, 7, 4, 3, 5, 2)) if bits == 4 else parts.permute(0, 1, 6, 2, 7, 4, 3, 5)
    return _units(words).reshape(*lead, tokens, cache_width(width, bits))


def unpack_values(packed: Tensor, head_width: int, bits: int) -> Tensor:
    """Inverse of `pack_values`: int8 (..., tokens, D)."""
    lead, tokens = _check_packed(packed, head_width, bits)
    tiles = head_width // 8
    words = _words(packed)
    if bits == 4:
        parts = _codes_of(words).reshape(-1, tokens // 32, tiles, 8, 4, 2, 2, 2).permute(0, 1, 7, 5, 4, 6, 2, 3)
    else:
        parts = words.view(torch.int8).reshape(-1, tokens // 32, tiles, 2, 8, 4, 2, 2).permute(0, 1, 3, 6, 5, 7, 2, 4)
    return parts.reshape(*lead, tokens, head_width)


def _nibbles(pairs: Tensor) -> Tensor:
    """Codes (..., 2) to bytes, the first of a pair in the low nibble."""
    bits = pairs.contiguous().view(torch.uint8) & 0x0F
    return bits[..., 0] | bits[..., 1] << 4


def _codes_of(words: Tensor) -> Tensor:
    """Inverse of `_nibbles`."""
    both = torch.stack((words << 4, words & 0xF0), dim=-1)  # 16 * code, as the kernels see them
    return both.view(torch.int8) >> 4


def _units(words: Tensor) -> Tensor:
    """Words in order of their number, each (8 g, 4 t, 4 j), to bytes: four words of a lane side by side."""
    return words.reshape(-1, 4, 32, 4).transpose(1, 2).contiguous().view(torch.uint8)


def _words(packed: Tensor) -> Tensor:
    """Inverse of `_units`: bytes to (units, 4 words, 32 lanes, 4 bytes)."""
    return packed.reshape(-1, 32, 4, 4).transpose(1, 2)


def _check_codes(codes: Tensor, bits: int) -> tuple[torch.Size, int, int]:
    lead, (tokens, width) = codes.shape[:-2], codes.shape[-2:]
    cache_width(width, bits)
    if codes.dtype != torch.int8 or tokens % CAPACITY_MULTIPLE or not tokens:
        raise KernelError(
            f"codes are {codes.dtype} of {tokens} tokens; pass int8, tokens a multiple of {CAPACITY_MULTIPLE}"
        )
    return lead, tokens, width


def _check_packed(packed: Tensor, head_width: int, bits: int) -> tuple[torch.Size, int]:
    lead, (tokens, width) = packed.shape[:-2], packed.shape[-2:]
    wanted = cache_width(head_width, bits)
    if packed.dtype != torch.uint8 or tokens % CAPACITY_MULTIPLE or width != wanted:
        raise KernelError(
            f"cache is {packed.dtype} {tuple(packed.shape)}; pass uint8 (..., tokens, {wanted}), "
            f"tokens a multiple of {CAPACITY_MULTIPLE}"
        )
    return lead, tokens
