"""How `gemm_prefill.cu` cuts a product: which tile, and how tiles are spread over the multiprocessors.

A `Plan` is all that can be chosen. `configurations` lists those that fit a problem, `choose` takes the one that a small
model of the kernel finds fastest: the time of 128 k of a tile, a fixed part for every tile, what it costs to share a
tile, and the launch; the rest is counting rounds. `benchmarks/tune_gemm.py` times all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["BLOCK_K", "TILES", "Plan", "choose", "configurations", "seconds"]

TILES = ((64, 128), (96, 128), (128, 128), (192, 128), (256, 128), (64, 256), (96, 256), (128, 256))
"""Tiles (tokens, channels). The sums of a tile fill the registers at 256 x 128 and 128 x 256."""

BLOCK_K = 128  # k of one step of the kernel's ring
REMEMBERED = 4096  # problems whose plan is kept
LEAST_RANGE = 4  # k-blocks of a program's share of divided tiles; shorter ones cost more than they hide

# The model of one multiprocessor, fitted to every plan of the linear layers of Llama-2-7B with 4-bit weights and 64 ..
# 2048 tokens (NVIDIA H200, launches overlapped). It meets the plans within 10 % of the best to 4 % (root mean square),
# and what it chose took at most 4 % longer than the best. 8-bit weights, other shapes and other chips are extrapolated.
CLOCK = 1.7e9  # under the power limit
MULTIPLIES = 4096  # int8 multiply-adds of a cycle
# Each half of a block waits for its operands to be unpacked while only the other half multiplies. In small tiles that
# is not enough to hide it: half of the multiplications and these cycles of a block follow one another.
BLOCK_CYCLES, GROUP_CYCLES = 150, 70  # of a block, and of every 64 channels in it
CACHE_WIDTH = 45  # bytes of a cycle that L2 delivers
# For each of those bytes: moving them takes power, so the clock falls. Seen in launches of 0.2 ms and more only, where
# it decides between 128 x 256 and 256 x 128; times there vary by as much as what it adds.
CACHE_SECONDS = 1.5e-13
TILE_SECONDS = 0.8e-6  # of a tile beside its blocks: results to memory, and nothing multiplies meanwhile
# A tile's sums are exchanged: by each program that has a part, wait and writing or reading of an int32.
EXCHANGE_SECONDS, SUM_SECONDS = 0.4e-6, 5.5e-11
DIVIDED = 1.02  # of a block: programs that stand at different k share less of what they load
LAUNCH_SECONDS, FIRST_SECONDS = 2.7e-6, 0.3e-6  # start and end of a launch; first weights of every 128 channels
AHEAD_SECONDS = 1.3e-6  # of it hidden where the next launch finds as many idle multiprocessors as it needs


@dataclass(frozen=True)
class Plan:
    """How a problem is cut.

    Attributes:
        tokens: of a tile; also the width of the wgmma instruction.
        channels: of a tile, 128 or 256.
        whole: tiles that are taken undivided; the k-blocks of the others are shared out evenly.
        grid: programs.
    """

    tokens: int
    channels: int
    whole: int
    grid: int

    def tiles(self, tokens: int, channels: int) -> int:
        """Tiles of a result of so many tokens and channels."""
        return -(-tokens // self.tokens) * -(-channels // self.channels)

    def __str__(self) -> str:
        return f"{self.tokens}x{self.channels} whole {self.whole} on {self.grid}"


@lru_cache(REMEMBERED)
def configurations(tokens: int, channels: int, width: int, sms: int) -> tuple[Plan, ...]:
    """All plans for a product of (tokens, width) codes and (channels, width) weights on `sms` multiprocessors."""
    return tuple(plan for tile in TILES for plan in _plans(tokens, channels, width, sms, *tile))


def _plans(tokens: int, channels: int, width: int, sms: int, tile_tokens: int, tile_channels: int) -> Iterator[Plan]:
    tiles = -(-tokens // tile_tokens) * -(-channels // tile_channels)
    blocks = -(-width // BLOCK_K)
    yield Plan(tile_tokens, tile_channels, tiles, min(tiles, sms))
    rounds, rest = divmod(tiles, sms)
    if rest == 0:
        return
    # Divided: the last, incomplete round; with the round before it, every program has at most two pieces.
    options = {(rounds * sms, sms), (max(0, rounds - 1) * sms, sms)}
    if rounds == 0 and sms // tiles > 1:
        options.add((0, sms // tiles * tiles))  # every tile in equal parts: no program serves two
    for whole, grid in sorted(options):
        if (tiles - whole) * blocks >= LEAST_RANGE * grid:
            yield Plan(tile_tokens, tile_channels, whole, grid)


def seconds(plan: Plan, tokens: int, channels: int, width: int, weight_bits: int, sms: int) -> float:
    """What the model expects a plan to take on `sms` multiprocessors, as long as memory keeps up."""
    tiles = plan.tiles(tokens, channels)
    blocks = -(-width // BLOCK_K)
    outputs = plan.tokens * plan.channels
    block = _block_seconds(plan, weight_bits)
    tile = blocks * block + TILE_SECONDS
    if plan.whole == tiles:
        work = -(-tiles // plan.grid) * tile
    else:
        divided = tiles - plan.whole
        share = divided * blocks / plan.grid  # k-blocks of a program's range
        # Either every tile is divided into equal ranges, and nobody serves two; or ranges lie across tiles.
        across = plan.grid % divided != 0
        ranges = max(2.0, blocks / share + across)  # of a divided tile
        pieces = share / blocks + 1 if across else 1.0  # of a program
        work = plan.whole / plan.grid * tile + share * block * DIVIDED + pieces * TILE_SECONDS
        work += ranges * (EXCHANGE_SECONDS + SUM_SECONDS * outputs)
    launch = LAUNCH_SECONDS + FIRST_SECONDS * plan.channels / 128
    launch -= AHEAD_SECONDS * min(1.0, (sms - plan.grid) / plan.grid)
    return launch + work


def _block_seconds(plan: Plan, weight_bits: int) -> float:
    """One step of the ring: 128 k of a tile."""
    outputs = plan.tokens * plan.channels
    loaded = BLOCK_K * (plan.tokens + plan.channels * weight_bits / 8)  # bytes
    multiply = BLOCK_K * outputs / MULTIPLIES
    unpack = BLOCK_CYCLES + GROUP_CYCLES * plan.channels / 64
    cycles = max(multiply, multiply / 2 + unpack, loaded / CACHE_WIDTH)
    return cycles / CLOCK + CACHE_SECONDS * loaded


@lru_cache(REMEMBERED)
def choose(tokens: int, channels: int, width: int, sms: int, weight_bits: int) -> Plan:
    """The plan that the model finds fastest."""
    plans = configurations(tokens, channels, width, sms)
    return min(plans, key=lambda plan: seconds(plan, tokens, channels, width, weight_bits, sms))
