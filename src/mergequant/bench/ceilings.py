"""Measure what the machine can do at best: reading, int8 tensor cores, cuBLAS in bf16 and fp8.

Rates are given twice. Large products draw so much power that the clock falls within a tenth of a second: `burst` is
what the first calls reach after a rest, `sustained` what remains after a third of a second.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mergequant.bench.roofline import Ceilings, Rate
from mergequant.bench.timing import Call, capture, one_time, times
from mergequant.ops.cuda import launch, wgmma
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import Kernel, Long

__all__ = ["HOT_SECONDS", "REST_SECONDS", "measure_ceilings", "measure_reading", "rate_of", "source"]

READ_BYTES = 4 << 30
READ_SIZES_MB = (8, 16, 45)  # one decode GEMM reads about that
READ_THREADS = 512  # as in ceilings.cu
READ_BLOCKS = (1, 2, 4, 8)  # per multiprocessor, tried
EMPTY_KERNELS = 50

RATE_THREADS, RATE_WIDTH = 256, 256  # as in ceilings.cu: threads of a block, columns of the wgmma instruction
RATE_OPERATIONS = 2 * 2 * 4 * 64 * RATE_WIDTH * 32  # of a block in one iteration: multiply and add count as two
RATE_SHARED = 2 * RATE_WIDTH * 128 + 1024  # two operands and their alignment
RATE_ITERATIONS = 8000  # 4 to 5 ms on an H200

HOPPER = (9, 0)
GEMM_SIZE = 8192  # square, for cuBLAS
REST_SECONDS = 0.2  # without work, before a burst
BURST_CALLS = 20
HOT_SECONDS = 0.35  # of work before sustained rates are taken


def measure_ceilings(device: torch.device, fp8: bool = True) -> Ceilings:
    """All ceilings of a CUDA device, in about five seconds.

    Args:
        device: to measure.
        fp8: whether to measure fp8 products; not before compute capability 8.9.
    """
    hopper = torch.cuda.get_device_capability(device) == HOPPER
    read, by_size, empty = measure_reading(device)
    int8 = _wgmma_rate(launch.kernel(source(True), "int8_rate", device), device) if hopper else _int8_cublas(device)
    rates = {"int8": int8}
    rates["bf16"] = _cublas(torch.bfloat16, device)
    if fp8:
        rates["fp8"] = _cublas(torch.float8_e4m3fn, device)
    return Ceilings(read, by_size, empty, rates)


def source(hopper: bool) -> Unit:
    """The micro-benchmarks' CUDA source; with the wgmma kernel for sm_90a."""
    return Unit("ceilings.cu", (("MQ_WGMMA", int(hopper)),), (wgmma.header(RATE_WIDTH),) if hopper else ())


def rate_of(call: Call, operations: float, device: torch.device, estimate: float) -> Rate:
    """Burst and sustained rate of a call.

    Args:
        call: does `operations` operations.
        operations: of one call.
        device: CUDA.
        estimate: milliseconds of one call, about.
    """
    torch.cuda.synchronize(device)
    time.sleep(REST_SECONDS)
    burst = _mean(call, device, max(2, min(BURST_CALLS, int(20 / estimate))))
    _mean(call, device, max(1, int(HOT_SECONDS * 1e3 / estimate)))
    hot = _mean(call, device, max(2, int(HOT_SECONDS * 1e3 / 3 / estimate)))
    return Rate(operations / burst / 1e9, operations / hot / 1e9)


def _mean(call: Call, device: torch.device, count: int) -> float:
    """Milliseconds per call of `count` calls, one straight after the other."""

    def many() -> None:
        for _ in range(count):
            call()

    return times(many, device, 1)[0] / count


def measure_reading(device: torch.device) -> tuple[float, dict[int, float], float]:
    """TB/s of a large read, TB/s by size in MB, and microseconds of a kernel that reads 16 bytes, on a CUDA device."""
    kernel = launch.kernel(source(torch.cuda.get_device_capability(device) == HOPPER), "read_all", device)
    data = torch.empty(READ_BYTES // 4, device=device, dtype=torch.int32).random_()
    sink = torch.zeros(16, device=device, dtype=torch.int32)
    processors = launch.multiprocessors(device)

    def read(start: int, size: int, blocks: int) -> None:
        part = data[start // 4 : (start + size) // 4]
        kernel.launch((blocks, 1, 1), READ_THREADS, [part, Long(size // 16), sink])

    def fastest(places: Sequence[int], size: int) -> float:
        """Milliseconds of one read, with the best number of blocks."""
        found = []
        for share in READ_BLOCKS:

            def every(blocks: int = share * processors) -> None:
                for start in places:
                    read(start, size, blocks)

            found.append(one_time(capture(every, device), device) / len(places))
        return min(found)

    large = READ_BYTES / fastest([0], READ_BYTES) / 1e9
    by_size = {}
    for size in (mb * 1_000_000 // 512 * 512 for mb in READ_SIZES_MB):
        places = [place * size for place in range(min(32, READ_BYTES // size))]
        by_size[round(size / 1e6)] = size / fastest(places, size) / 1e9

    def nothing() -> None:
        for _ in range(EMPTY_KERNELS):
            read(0, 16, 1)

    empty = one_time(capture(nothing, device), device) / EMPTY_KERNELS * 1e3
    return large, by_size, empty


def _wgmma_rate(kernel: Kernel, device: torch.device) -> Rate:
    """The bare instruction on random operands; power depends on what is multiplied."""
    processors = launch.multiprocessors(device)
    source = torch.randint(-(2**31), 2**31 - 1, (RATE_SHARED // 4,), device=device, dtype=torch.int32)
    sink = torch.empty(processors * RATE_THREADS, device=device, dtype=torch.int32)

    def call() -> None:
        kernel.launch((processors, 1, 1), RATE_THREADS, [RATE_ITERATIONS, source, sink], shared=RATE_SHARED)

    estimate = one_time(call, device)
    return rate_of(call, processors * RATE_ITERATIONS * RATE_OPERATIONS, device, estimate)


def _int8_cublas(device: torch.device) -> Rate:
    """int8 by cuBLAS, where wgmma is not."""
    a = torch.randint(-128, 128, (GEMM_SIZE, GEMM_SIZE), device=device, dtype=torch.int8)
    return _square_rate(lambda: torch._int_mm(a, a.t()), device)


def _cublas(dtype: torch.dtype, device: torch.device) -> Rate:
    """A square product by cuBLAS: bf16, or fp8 with row scales."""
    a: Tensor = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=torch.bfloat16).to(dtype)
    b = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=torch.bfloat16).to(dtype)
    if dtype == torch.bfloat16:
        return _square_rate(lambda: torch.mm(a, b.t()), device)
    scale = torch.ones(GEMM_SIZE, 1, device=device)

    def call() -> Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return _square_rate(call, device)


def _square_rate(call: Call, device: torch.device) -> Rate:
    return rate_of(call, 2.0 * GEMM_SIZE**3, device, one_time(call, device))
