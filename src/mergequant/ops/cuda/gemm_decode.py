"""Integer GEMMs for few tokens (1..128): which kernel with which parameters, and its launch.

Two kernels, both bound by reading the weight once (`gemm_stream.cu` and `gemm_cluster.cu` say how they work):

- stream: 1..16 tokens, `mma.sync`, the weight straight to registers. The better one for up to four tokens, except where
  there are very many outputs.
- cluster: 1..128 tokens, `wgmma`, the weight through shared memory, k split over the blocks of a cluster.

Overlapped, both start reading the weight before the kernel ahead of them has ended; everything else they read after it.
Measured times of the two, and of a plain read of the weight, are in `docs/results.md`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergequant.errors import KernelError
from mergequant.ops.cuda import wgmma
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel, multiprocessors, tensor_map
from mergequant.ops.overlap import overlaps
from mergequant.ops.tiles import TILE_ROWS, TILE_WIDTH, tile_bytes

__all__ = [
    "MOST_TOKENS",
    "Cluster",
    "Configuration",
    "Stream",
    "choose",
    "configurations",
    "launch_cluster",
    "launch_stream",
    "linear",
    "swiglu_quant",
]

MOST_TOKENS = 128
COPY_BYTES = 16  # rows of x start at multiples of it, for the copies of both kernels
SHARED_MULTIPROCESSOR = 228 * 1024  # bytes of shared memory of an sm_90 multiprocessor,
SHARED_RESERVED = 1024  # of which the system takes this much for every block


@dataclass(frozen=True)
class Stream:
    """Parameters of `gemm_stream.cu`: up to 8 `token_tiles` tokens; `warps` of a block share k, each with `depth` loads
    of 512 bytes in flight; `blocks` of a multiprocessor."""

    token_tiles: int
    warps: int
    depth: int
    blocks: int

    @property
    def tokens(self) -> int:
        """Most tokens of a launch."""
        return 8 * self.token_tiles

    def shared(self, rows: int, width: int) -> int:
        """Bytes of shared memory of a block: all of x, padded, and two buffers of sums."""
        return rows * (_columns(width) * TILE_WIDTH + 16) + 2 * self.warps * self.tokens * 20 * 4


@dataclass(frozen=True)
class Cluster:
    """Parameters of `gemm_cluster.cu`: up to `tokens` tokens; `parts` blocks of a cluster share k; `blocks` of a
    multiprocessor share its memory."""

    tokens: int
    parts: int
    blocks: int

    def stages(self, weight_bits: int) -> int:
        """Ring buffers: what fits, but no more than a block can use."""
        room = _shared_of_block(self.blocks) - self._ALIGNMENT
        return min(self._MOST_STAGES, room // (self._stage(weight_bits) + self._BARRIERS))

    def shared(self, weight_bits: int) -> int:
        """Bytes of shared memory of a block: the ring, in whose place the sums come later."""
        ring = self.stages(weight_bits) * (self._stage(weight_bits) + self._BARRIERS)
        return self._ALIGNMENT + max(ring, self.tokens * 132 * 4)

    def _stage(self, weight_bits: int) -> int:
        return self.tokens * TILE_WIDTH + 2 * tile_bytes(weight_bits)

    _ALIGNMENT = 1024
    _BARRIERS = 16  # bytes of the two barriers of a stage
    _MOST_STAGES = 12


Configuration = Stream | Cluster

# `choose` takes the first stream, and a cluster; the others are there to be measured again on another chip.
STREAMS = (
    Stream(1, 8, 8, 2),
    Stream(1, 4, 16, 3),
    Stream(1, 4, 8, 4),
    Stream(1, 8, 4, 4),
    Stream(1, 16, 4, 2),
    Stream(1, 16, 8, 1),
    Stream(2, 8, 8, 2),
    Stream(2, 8, 4, 3),
    Stream(2, 16, 4, 1),
)
CLUSTERS = tuple(
    Cluster(tokens, parts, blocks)
    for tokens, blocks in ((8, 2), (16, 2), (32, 2), (64, 2), (64, 1), (128, 1))
    for parts in (1, 2, 3, 4, 6, 8)
)

# Measured on an NVIDIA H200 with the layers of Llama-2-7B, launches overlapped.
STREAM_TOKENS = 4  # up to here the stream kernel wins ...
STREAM_OUTPUTS = 16384  # ... below this many outputs
BLOCK_OUTPUTS = 2 * TILE_ROWS  # of a block of the cluster kernel
# More parts read the weight faster as long as all clusters run at once: a cluster has to find its places side by side,
# so that not all of the chip can be filled. And every part needs enough k: more of it where more sums are exchanged.
MOST_FILL = 0.75
FEW_TOKENS, LEAST_COLUMNS_FEW, LEAST_COLUMNS = 16, 8, 12  # columns of 128 k of a part, up to so many tokens and above


@cache
def choose(rows: int, outputs: int, width: int, swiglu: bool, processors: int) -> Configuration:
    """Configuration for a shape on a chip of `processors` multiprocessors.

    The stream kernel for up to four tokens, unless gate and up are fused, there are very many outputs, or x does not
    fit its shared memory. Else the cluster kernel: with one block for a multiprocessor where that is possible and
    enough, and in the most parts that can run at once and have enough to do.

    Raises:
        KernelError: more tokens than these kernels take.
    """
    if rows <= STREAM_TOKENS and not swiglu and outputs < STREAM_OUTPUTS and _fits(STREAMS[0], rows, width):
        return STREAMS[0]
    tokens = min((known.tokens for known in CLUSTERS if rows <= known.tokens), default=0)
    if not tokens:
        raise KernelError(f"the decode GEMMs take up to {MOST_TOKENS} tokens, not {rows}; use gemm_prefill")
    needed = -(-outputs // BLOCK_OUTPUTS)
    offered = {known.blocks for known in CLUSTERS if known.tokens == tokens}
    blocks = min(offered) if needed <= processors else max(offered)
    columns = LEAST_COLUMNS_FEW if tokens <= FEW_TOKENS else LEAST_COLUMNS
    most = max(1, min(MOST_FILL * blocks * processors / needed, _columns(width) / columns))
    same = (known for known in CLUSTERS if (known.tokens, known.blocks) == (tokens, blocks))
    return max((known for known in same if known.parts <= most), key=lambda known: known.parts)


def configurations(rows: int, outputs: int, width: int) -> list[Configuration]:
    """All that can run a shape: what tests go through, and what a search for the fastest may try."""
    streams = [known for known in STREAMS if rows <= known.tokens and _fits(known, rows, width)]
    least = min((known.tokens for known in CLUSTERS if rows <= known.tokens), default=0)
    return [*streams, *(known for known in CLUSTERS if known.tokens == least)]


def linear(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
    *,
    configuration: Configuration | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """`tiled_linear` for few tokens.

    Args:
        codes: int8 (rows, width), contiguous, 16-byte aligned.
        tiles, weight_scale: as of `tiled_linear`.
        token_scale: optional float32 (rows,).
        bias: optional float32 (outputs,).
        weight_bits: 4 or 8.
        out_dtype: bfloat16 or float16.
        configuration: None for the one that `choose` takes.
        overlap: whether the kernel may start before its predecessor has ended; None for what `overlaps` says.

    Returns:
        (rows, outputs).

    Raises:
        KernelError: a configuration that cannot run the shape.
    """
    rows, outputs = codes.shape[0], weight_scale.shape[0]
    # Kernels write several outputs at a time: rows of whole groups of 8, cut afterwards where there are fewer.
    result = torch.empty((rows, -(-outputs // 8) * 8), dtype=out_dtype, device=codes.device)
    _launch(codes, tiles, weight_scale, token_scale, bias, weight_bits, result, 0, configuration, overlap)
    return result if result.shape[1] == outputs else result[:, :outputs].contiguous()


def swiglu_quant(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    bits: int,
    *,
    configuration: Configuration | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """`tiled_swiglu_quant` for few tokens; arguments as `linear`, codes of `bits` bits (rows, outputs / 2)."""
    result = torch.empty((codes.shape[0], weight_scale.shape[0] // 2), dtype=torch.int8, device=codes.device)
    _launch(codes, tiles, weight_scale, token_scale, bias, weight_bits, result, bits, configuration, overlap)
    return result


def launch_stream(
    configuration: Stream,
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    result: Tensor,
    code_bits: int,
    overlap: bool,
) -> None:
    """Launch `gemm_stream.cu`.

    Args are those of `linear`, but codes are a multiple of 16 wide, `result` is 16-bit floats (rows, outputs rounded up
    to 8) or int8 (rows, outputs / 2), and `code_bits` is 0 for a linear layer, else the width of the SwiGLU codes.
    """
    rows, width = codes.shape
    outputs = weight_scale.shape[0]
    if rows > configuration.tokens or not _fits(configuration, rows, width):
        raise KernelError(f"{configuration} does not take {rows} tokens of width {width}; use a Cluster")
    unit = stream_unit(configuration, weight_bits, code_bits, result.dtype == torch.float16)
    blocks = min(-(-outputs // 16), configuration.blocks * multiprocessors(codes.device))
    kernel(unit, "gemm_stream", codes.device).launch(
        (blocks, 1, 1),
        32 * configuration.warps,
        (tiles, codes, weight_scale, token_scale, bias, result, rows, outputs, width),
        shared=configuration.shared(rows, width),
        overlap=overlap,
    )


def launch_cluster(
    configuration: Cluster,
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    result: Tensor,
    code_bits: int,
    overlap: bool,
) -> None:
    """Launch `gemm_cluster.cu`; arguments as of `launch_stream`."""
    rows, width = codes.shape
    outputs = weight_scale.shape[0]
    if rows > configuration.tokens:
        raise KernelError(f"{configuration} does not take {rows} tokens")
    unit = cluster_unit(configuration, weight_bits, code_bits, result.dtype == torch.float16)
    parts = configuration.parts
    kernel(unit, "gemm_cluster", codes.device).launch(
        (-(-outputs // BLOCK_OUTPUTS), parts, 1),
        288,
        (
            tensor_map(codes, (configuration.tokens, TILE_WIDTH), swizzle=True),
            *(tiles, weight_scale, token_scale, bias, result, rows, outputs, _columns(width)),
        ),
        shared=configuration.shared(weight_bits),
        cluster=(1, parts, 1),
        overlap=overlap,
    )


@cache
def stream_unit(configuration: Stream, weight_bits: int, code_bits: int, half: bool) -> Unit:
    """What is compiled for a configuration of the stream kernel."""
    return Unit(
        "gemm_stream.cu",
        (
            ("MQ_BITS", weight_bits),
            ("MQ_TOKEN_TILES", configuration.token_tiles),
            ("MQ_WARPS", configuration.warps),
            ("MQ_DEPTH", configuration.depth),
            ("MQ_BLOCKS", configuration.blocks),
            *_result_defines(code_bits, half),
        ),
    )


@cache
def cluster_unit(configuration: Cluster, weight_bits: int, code_bits: int, half: bool) -> Unit:
    """What is compiled for a configuration of the cluster kernel."""
    return Unit(
        "gemm_cluster.cu",
        (
            ("MQ_BITS", weight_bits),
            ("MQ_PARTS", configuration.parts),
            ("MQ_STAGES", configuration.stages(weight_bits)),
            ("MQ_BLOCKS", configuration.blocks),
            *_result_defines(code_bits, half),
        ),
        (wgmma.header(configuration.tokens),),
    )


def _launch(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    result: Tensor,
    code_bits: int,
    configuration: Configuration | None,
    overlap: bool | None,
) -> None:
    codes = pad(codes, (0, -codes.shape[1] % COPY_BYTES)) if codes.shape[1] % COPY_BYTES else codes
    overlap = overlaps(codes.device) if overlap is None else overlap
    if configuration is None:
        rows, width = codes.shape
        outputs, processors = weight_scale.shape[0], multiprocessors(codes.device)
        configuration = choose(rows, outputs, width, code_bits > 0, processors)
    arguments = (codes, tiles, weight_scale, token_scale, bias, weight_bits, result, code_bits, overlap)
    if isinstance(configuration, Stream):
        launch_stream(configuration, *arguments)
    else:
        launch_cluster(configuration, *arguments)


def _result_defines(code_bits: int, half: bool) -> tuple[tuple[str, int], ...]:
    return ("MQ_SWIGLU", int(code_bits > 0)), ("MQ_CODE_BITS", code_bits or 8), ("MQ_HALF", int(half and not code_bits))


def _columns(width: int) -> int:
    return -(-width // TILE_WIDTH)


def _shared_of_block(blocks: int) -> int:
    return SHARED_MULTIPROCESSOR // blocks - SHARED_RESERVED


def _fits(configuration: Stream, rows: int, width: int) -> bool:
    return configuration.shared(rows, width) <= _shared_of_block(configuration.blocks)
