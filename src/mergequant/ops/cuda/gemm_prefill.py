"""Host side of `gemm_prefill.cu`: the integer GEMM for many tokens."""

import threading
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergequant.errors import KernelError
from mergequant.ops.cuda import launch, wgmma
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.prefill_plan import BLOCK_K, Plan, choose, configurations
from mergequant.ops.overlap import overlaps

__all__ = ["KERNEL", "SWIGLU", "Plan", "choose", "configurations", "linear", "shared_bytes", "swiglu_quant", "unit"]

KERNEL = "gemm_prefill"
THREADS = 384
MOST_SHARED = 227 * 1024  # bytes of shared memory that a program can have
MOST_STAGES = 8
BAND = 8  # token tiles that are walked together: what lets programs side by side share L2
EPILOGUES = {torch.bfloat16: 0, torch.float16: 1}
SWIGLU = 2


def unit(plan: Plan, weight_bits: int, epilogue: int, bits: int = 8) -> Unit:
    """What is to be compiled for a plan: epilogue 0 bfloat16, 1 float16, 2 SwiGLU and codes of `bits` bits."""
    return _unit(plan.tokens, plan.channels, weight_bits, epilogue, bits if epilogue == SWIGLU else 8)


@cache
def _unit(tokens: int, channels: int, weight_bits: int, epilogue: int, bits: int) -> Unit:
    return Unit(
        "gemm_prefill.cu",
        (
            ("MQ_WEIGHT_BITS", weight_bits),
            ("MQ_TOKENS", tokens),
            ("MQ_CHANNELS", channels),
            ("MQ_STAGES", _stages(tokens, channels, weight_bits, epilogue)),
            ("MQ_EPILOGUE", epilogue),
            ("MQ_CODE_BITS", bits),
        ),
        (wgmma.header(tokens),),
    )


def _stage_bytes(tokens: int, channels: int, weight_bits: int) -> int:
    return BLOCK_K * (tokens + channels * weight_bits // 8) + 16  # with two barriers


def _output_bytes(tokens: int, channels: int, epilogue: int) -> int:
    return tokens * channels // 2 if epilogue == SWIGLU else tokens * channels * 2


def _stages(tokens: int, channels: int, weight_bits: int, epilogue: int) -> int:
    room = MOST_SHARED - _output_bytes(tokens, channels, epilogue)
    return min(MOST_STAGES, room // _stage_bytes(tokens, channels, weight_bits))


def shared_bytes(plan: Plan, weight_bits: int, epilogue: int) -> int:
    """Dynamic shared memory of the kernel: ring, output buffer, barriers (see the source for the layout)."""
    tile = plan.tokens, plan.channels
    ring = _stages(*tile, weight_bits, epilogue) * _stage_bytes(*tile, weight_bits)
    return ring + _output_bytes(*tile, epilogue)


def linear(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """y[m, n] = sum_k codes[m, k] weight[n, k] * weight_scale[n] (* token_scale[m]) (+ bias[n]).

    Args:
        codes: int8 (rows, width), contiguous, width <= 130000.
        tiles: uint8 of `tile_weight`.
        weight_scale: float32 (outputs,).
        token_scale: optional float32 (rows,).
        bias: optional float32 (outputs,).
        weight_bits: 4 or 8.
        out_dtype: bfloat16 or float16.
        out: optional (rows, outputs), contiguous, of `out_dtype`: receives the result.
        plan: cut to use instead of `choose`'s, for tests and tuning.

    Returns:
        (rows, outputs), contiguous.

    Raises:
        KernelError: another dtype of the result, or the kernel cannot be compiled or launched.
    """
    if out_dtype not in EPILOGUES:
        raise KernelError(f"{KERNEL} writes {', '.join(map(str, EPILOGUES))}, not {out_dtype}")
    outputs = weight_scale.shape[0]
    target = _target(codes, outputs, out_dtype, out)
    _launch(codes, tiles, weight_scale, token_scale, bias, weight_bits, target, EPILOGUES[out_dtype], 8, plan)
    return _result(target, outputs, out)


def swiglu_quant(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    bits: int,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Codes of silu(gate) * up, where gate and up rows are interleaved in groups of 8.

    Args:
        codes: int8 (rows, width), contiguous.
        tiles: uint8 of `tile_weight(interleave_rows(gate, up))`.
        weight_scale: float32 (2 ffn,), interleaved; `up`'s holds 1 / step of the result.
        token_scale: optional float32 (rows,).
        bias: optional float32 (2 ffn,), interleaved.
        weight_bits: 4 or 8.
        bits: width of the clamp.
        out: optional int8 (rows, ffn), contiguous: receives the result.
        plan: as in `linear`.

    Returns:
        int8 (rows, ffn), contiguous.

    Raises:
        KernelError: rows that are not interleaved groups of 8, or the kernel cannot be compiled or launched.
    """
    outputs = weight_scale.shape[0]
    if outputs % 16:
        raise KernelError(f"{KERNEL}: {outputs} rows are not groups of 8 gate and 8 up rows; use interleave_rows")
    target = _target(codes, outputs // 2, torch.int8, out)
    _launch(codes, tiles, weight_scale, token_scale, bias, weight_bits, target, SWIGLU, bits, plan)
    return _result(target, outputs // 2, out)


def _target(codes: Tensor, width: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Where the kernel writes. The copy engine wants rows of whole 16 bytes: else a wider buffer, cut afterwards."""
    alignment = 16 // dtype.itemsize
    if out is not None and width % alignment == 0:
        return out
    return codes.new_empty((codes.shape[0], -(-width // alignment) * alignment), dtype=dtype)


def _result(target: Tensor, width: int, out: Tensor | None) -> Tensor:
    if target is out:
        return target
    result = target if target.shape[1] == width else target[:, :width].contiguous()
    return result if out is None else out.copy_(result)


def _launch(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    target: Tensor,
    epilogue: int,
    bits: int,
    plan: Plan | None,
) -> None:
    if codes.shape[0] == 0:
        return
    if codes.shape[1] % 16:
        codes = pad(codes, (0, -codes.shape[1] % 16))
    device, (rows, width), outputs = codes.device, codes.shape, weight_scale.shape[0]
    plan = plan or choose(rows, outputs, width, launch.multiprocessors(device), weight_bits)
    partials = flags = None
    if plan.whole < plan.tiles(rows, outputs):
        partials = torch.empty(plan.grid * plan.tokens * plan.channels, dtype=torch.int32, device=device)
        flags = _flags(device)
    box = (plan.tokens, 32 if epilogue == SWIGLU else 64)
    launch.kernel(unit(plan, weight_bits, epilogue, bits), KERNEL, device).launch(
        (plan.grid, 1, 1),
        THREADS,
        (
            launch.tensor_map(codes, (plan.tokens, BLOCK_K), True),
            launch.tensor_map(target, box, epilogue != SWIGLU),
            tiles,
            weight_scale,
            token_scale,
            bias,
            partials,
            flags,
            rows,
            outputs,
            tiles.shape[1],
            tiles.shape[0],
            plan.whole,
            BAND,
        ),
        shared=shared_bytes(plan, weight_bits, epilogue),
        overlap=overlaps(device),
    )


# ---- flags ----------------------------------------------------------------------------------------------------------
# Programs that share a tile signal through flags, which every launch leaves at zero. Launches that may run at the same
# time need flags of their own. Those of one stream run one after another and share a row. A captured graph may be
# replayed on any stream: what one graph captured on one stream has a row for itself, for good.
FLAGS = 512  # of a row: two for each program
ROWS = 1024


class _FlagPool:
    """Rows of zeroed flags on one device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self.taken: dict[tuple[int, int], Tensor] = {}  # by stream and capture; never given back

    def take(self, device: torch.device) -> Tensor:
        """The row of the current stream, and of its capture if there is one."""
        stream = torch.cuda.current_stream(device)
        capture = _capture(stream.cuda_stream) if torch.cuda.is_current_stream_capturing() else 0
        with self._lock:
            if not self._free:
                if capture:  # zeroed by the graph itself, at every replay
                    return torch.zeros(FLAGS, dtype=torch.int32, device=device)
                self._free.extend(torch.zeros((ROWS, FLAGS), dtype=torch.int32, device=device).unbind())
                stream.synchronize()  # other streams will use them
            key = (stream.cuda_stream, capture)
            if key not in self.taken:
                self.taken[key] = self._free.pop()
            return self.taken[key]


def _capture(stream: int) -> int:
    """The number of the capture that a stream is in, unique in the process."""
    from cuda.bindings import driver

    status, _, number, *_ = driver.cuStreamGetCaptureInfo(stream)
    if int(status) != 0:
        raise KernelError(f"{KERNEL}: the driver does not tell what the stream is captured into: {status.name}")
    return int(number)


_pools: dict[torch.device, _FlagPool] = {}


def _flags(device: torch.device) -> Tensor:
    return _pools.setdefault(device, _FlagPool()).take(device)
