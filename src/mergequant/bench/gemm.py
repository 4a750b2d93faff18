"""One linear layer: tiled integer products against cuBLAS in bf16 and fp8.

Up to 512 rows weights are cold: calls go round copies of them that together are larger than the L2 cache. From 2048
rows on the product is bound by power, so there are two figures, a burst after a rest and the rate when hot.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mergequant import ops
from mergequant.bench.ceilings import rate_of
from mergequant.bench.float_decoder import FP8_ROWS, Linear
from mergequant.bench.phases import free
from mergequant.bench.report import Row
from mergequant.bench.roofline import Ceilings, gemm_floor
from mergequant.bench.shapes import layer_linears
from mergequant.bench.timing import Call, Timing, capture, interleaved, one_time, ratio
from mergequant.ops import backends
from mergequant.ops.overlap import overlapping
from mergequant.ops.tiles import tile_shape
from mergequant.runtime import DecoderShape

__all__ = ["GEMM_ROWS", "measure_gemms"]

GEMM_ROWS = (1, 16, 64, 128, 256, 512, 2048, 8192)
COLD_ROWS = 512  # up to here weights come from memory
COLD_BYTES = 130_000_000  # of copies: more than twice the L2 cache of an H200
MOST_COPIES = 64  # of layers so small that nobody measures them for their own sake
COLD_CALLS = 48  # in one graph
HOT_CALLS = 8

Products = list[Call]
Maker = Callable[[int, int, int, int], Products]  # rows, outputs, width, copies


def measure_gemms(
    shape: DecoderShape,
    against: Sequence[str],
    rows: Sequence[int],
    device: torch.device,
    passes: int,
    ceilings: Ceilings | None,
) -> Iterator[Row]:
    """Rows for every layer, number of rows and scheme; milliseconds are of one product."""
    makers = {name: _float_maker(name == "fp8", device) for name in ("bf16", "fp8") if name in against}
    makers |= {f"w{bits}a8": _integer_maker(bits, device) for bits in (4, 8)}
    for layer, (outputs, width) in layer_linears(shape).items():
        for count in rows:
            measure = _cold if count <= COLD_ROWS or device.type != "cuda" else _hot
            for mode, found in measure(makers, count, outputs, width, device, passes).items():
                for name, timing in found.items():
                    yield replace(
                        _row(name, timing, count, outputs, width, mode, ceilings, device),
                        what=layer,
                        vs_bf16=ratio(found["bf16"], timing) if "bf16" in found else None,
                        vs_fp8=ratio(found["fp8"], timing) if "fp8" in found else None,
                    )
            free(device)


def _cold(
    makers: dict[str, Maker], rows: int, outputs: int, width: int, device: torch.device, passes: int
) -> dict[str, dict[str, Timing]]:
    runs, counts = {}, {}
    for name, make in makers.items():
        size = outputs * width * BITS[name][0] // 8
        copies = min(MOST_COPIES, -(-COLD_BYTES // size)) if device.type == "cuda" else 1
        runs[name], counts[name] = _all_of(make(rows, outputs, width, copies), COLD_CALLS, device)
    found = interleaved(runs, device, passes)
    return {"cold": {name: timing.scaled(1 / counts[name]) for name, timing in found.items()}}


def _hot(
    makers: dict[str, Maker], rows: int, outputs: int, width: int, device: torch.device, passes: int
) -> dict[str, dict[str, Timing]]:
    found: dict[str, dict[str, Timing]] = {"burst": {}, "sustained": {}}
    for name, make in makers.items():
        run, count = _all_of(make(rows, outputs, width, 1), HOT_CALLS, device)
        # One operation a call: rates are then calls per picosecond, and their inverse is the time.
        rate = rate_of(run, count, device, one_time(run, device))
        found["burst"][name] = Timing((1e-9 / rate.burst,))
        found["sustained"][name] = Timing((1e-9 / rate.sustained,))
    return found


def _all_of(products: Products, least: int, device: torch.device) -> tuple[Call, int]:
    """All products in turn, so often that there are `least` calls, as one graph; and how many there are."""
    if device.type != "cuda":
        least = 1
    rounds = -(-least // len(products))

    def run() -> None:
        for _ in range(rounds):
            for product in products:
                product()

    return capture(run, device), rounds * len(products)


BITS = {"bf16": (16, 16), "fp8": (8, 8), "w4a8": (4, 8), "w8a8": (8, 8)}  # of weights, of inputs
KINDS = {"bf16": "bf16", "fp8": "fp8", "w4a8": "int8", "w8a8": "int8"}


def _row(
    name: str, timing: Timing, rows: int, outputs: int, width: int, mode: str, ceilings: Ceilings | None,
    device: torch.device,
) -> Row:  # fmt: skip
    percent = None
    if ceilings and KINDS[name] in ceilings.rates:
        both = ceilings.rates[KINDS[name]]
        rate = both.sustained if mode == "sustained" else both.burst
        percent = 100 * gemm_floor(ceilings, rows, outputs, width, BITS[name], rate) / timing.ms
    kernels = {"bf16": "torch.mm", "fp8": "torch._scaled_mm"}.get(name)
    return Row(
        "gemm",
        name,
        batch=rows,
        ms=timing.ms,
        tops=2 * rows * outputs * width / timing.ms / 1e9,
        gb_s=outputs * width * BITS[name][0] / 8 / timing.ms / 1e6,
        percent_of_ceiling=percent,
        kernels=(kernels or f"tiled_linear ({backends.choose('tiled_linear', device)})",),
        mode=mode,
        spread=timing.spread if len(timing.passes) > 1 else None,
    )


def _float_maker(fp8: bool, device: torch.device) -> Maker:
    def make(rows: int, outputs: int, width: int, copies: int) -> Products:
        linears = [Linear(outputs, width, fp8, False, device) for _ in range(copies)]
        x = torch.randn(-(-rows // FP8_ROWS) * FP8_ROWS if fp8 else rows, width, device=device, dtype=torch.bfloat16)
        if not fp8:
            return [partial(linear, x, None) for linear in linears]
        codes, scale = x.to(torch.float8_e4m3fn), torch.ones(x.shape[0], 1, device=device)
        return [partial(linear, codes, scale) for linear in linears]

    return make


def _integer_maker(bits: int, device: torch.device) -> Maker:
    def product(codes: Tensor, tile: Tensor, scale: Tensor) -> None:
        with overlapping():  # weights and scales were written long before
            ops.tiled_linear(codes, tile, scale, None, None, bits, torch.bfloat16)

    def make(rows: int, outputs: int, width: int, copies: int) -> Products:
        size = tile_shape(outputs, width, bits)
        tiles = [torch.randint(0, 256, size, device=device, dtype=torch.uint8) for _ in range(copies)]
        codes = torch.randint(-127, 128, (rows, width), device=device, dtype=torch.int8)
        scale = torch.full((outputs,), 1e-3, device=device)
        return [partial(product, codes, tile, scale) for tile in tiles]

    return make
