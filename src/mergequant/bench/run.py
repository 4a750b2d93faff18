"""The whole of `mergequant bench`: what is asked for, in an order that wastes no memory, to one report."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch

from mergequant.bench import machine
from mergequant.bench.baselines import CachePool, FloatScheme
from mergequant.bench.ceilings import measure_ceilings
from mergequant.bench.gemm import GEMM_ROWS, measure_gemms
from mergequant.bench.integers import IntegerScheme
from mergequant.bench.memory import measure_memory
from mergequant.bench.phases import BASELINES, Cell, Contest, free
from mergequant.bench.report import PHASES, BenchReport, Phase
from mergequant.bench.schemes import Builder
from mergequant.bench.shapes import parameters
from mergequant.errors import UsageError
from mergequant.runtime import Decoder, DecoderShape, random_decoder

__all__ = ["CELLS", "NEW_TOKENS", "Request", "run_bench"]

CELLS: dict[Phase, tuple[Cell, ...]] = {
    "memory": (Cell(1, 2048), Cell(16, 2048)),
    "prefill": (Cell(1, 128), Cell(1, 512), Cell(1, 2048), Cell(4, 2048), Cell(16, 1024), Cell(1, 8192)),
    "decode": (Cell(1, 2048), Cell(4, 2048), Cell(16, 2048), Cell(64, 512), Cell(64, 2048)),
    "e2e": (Cell(16, 1024),),
}
CONTESTS: tuple[Phase, ...] = ("prefill", "decode", "e2e")
NEW_TOKENS = 256
WEIGHT_BITS = 4
LEAST_FP8 = (8, 9)  # compute capability
GEMM_NOTE = (
    "gemm: cold calls of tiled_linear overlap their launches as in the decode loop (programmatic dependent launch); "
    "cuBLAS offers no such thing. Cold weights go round copies larger than the L2 cache"
)


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        name: of the shape, for the report.
        shape: of the decoder; its positions grow as the cells need.
        device: where.
        against: baselines, of "bf16" and "fp8".
        phases: which.
        cells: per phase; phases that are not named take `CELLS`.
        kvs: bits of mergequant's caches.
        passes: turns of each scheme.
        new_tokens: of e2e.
        gemm_rows: rows of the products in `gemm`.
        decoder: makes mergequant's decoder, None for random weights.
        command: for the report.
    """

    name: str
    shape: DecoderShape
    device: torch.device
    against: Sequence[str] = BASELINES
    phases: Sequence[Phase] = PHASES
    cells: Mapping[Phase, Sequence[Cell]] = field(default_factory=dict)
    kvs: Sequence[int] = (16, 8, 4)
    passes: int = 3
    new_tokens: int = NEW_TOKENS
    gemm_rows: Sequence[int] = GEMM_ROWS
    decoder: Callable[[], Decoder] | None = None
    command: str = ""

    def cells_of(self, phase: Phase) -> Sequence[Cell]:
        """Cells of a phase."""
        return self.cells.get(phase, CELLS.get(phase, ()))

    @property
    def positions(self) -> int:
        """Positions that the longest cell needs."""
        lengths = [cell.context for phase in self.phases for cell in self.cells_of(phase)]
        lengths += [cell.context + self.new_tokens for cell in self.cells_of("e2e") if "e2e" in self.phases]
        return max([self.shape.positions, *lengths])


@torch.no_grad()
def run_bench(request: Request, progress: Callable[[str], None] = lambda text: None) -> BenchReport:
    """Measure, and say so.

    Args:
        request: what.
        progress: told what begins.

    Raises:
        UsageError: fp8 on a device without it.
    """
    started = time.perf_counter()
    device = request.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it
        request = replace(request, device=device)
    if "fp8" in request.against and device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_FP8:
        raise UsageError("fp8 products need compute capability 8.9 or newer; pass --against bf16")
    report = BenchReport(
        {**machine.describe_device(device), "clocks": {"before": machine.clocks(device)}},
        machine.versions(device),
        {"name": request.name, **asdict(request.shape), "parameters": parameters(request.shape)},
        None,
        command=request.command,
    )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _measure(request, report, progress)
    report.device["clocks"]["after"] = machine.clocks(device)
    report.seconds = time.perf_counter() - started
    return report


def _measure(request: Request, report: BenchReport, progress: Callable[[str], None]) -> None:
    """Everything, in an order in which no weights are on the device that the phase does not need."""
    device = request.device
    if device.type == "cuda":
        progress("ceilings")
        report.ceilings = measure_ceilings(device, "fp8" in request.against)
        free(device)
    builders = _builders(request, CachePool())
    if "memory" in request.phases:
        progress("memory")
        report.rows += measure_memory(builders, request.cells_of("memory"), request.kvs, device)
    if "gemm" in request.phases:
        progress("gemm")
        report.rows += measure_gemms(
            request.shape, request.against, request.gemm_rows, device, request.passes, report.ceilings
        )
        report.notes.append(GEMM_NOTE)
    _contest(request, builders, report, progress)


def _contest(
    request: Request, builders: Mapping[str, Builder], report: BenchReport, progress: Callable[[str], None]
) -> None:
    """The phases in which schemes take turns, their weights side by side on the device."""
    phases = [phase for phase in CONTESTS if phase in request.phases]
    if not phases:
        return
    progress("building decoders")
    schemes = [build() for build in builders.values()]
    contest = Contest(schemes, request.kvs, request.device, request.passes, report.ceilings, report.notes)
    for phase in phases:
        for cell in request.cells_of(phase):
            progress(f"{phase} {cell.batch} x {cell.context}")
            if phase == "prefill":
                report.rows += contest.prefill(cell)
            elif phase == "decode":
                report.rows += contest.decode(cell)
            else:
                report.rows += contest.e2e(cell, request.new_tokens)
        report.device["clocks"][f"after {phase}"] = machine.clocks(request.device)
    notes = [note for scheme in schemes for note in scheme.notes]
    report.notes = list(dict.fromkeys([*report.notes, *notes]))
    schemes.clear()
    free(request.device)


def _builders(request: Request, pool: CachePool) -> dict[str, Builder]:
    """What makes each scheme, baselines first."""
    shape, device = replace(request.shape, positions=request.positions), request.device

    def own() -> IntegerScheme:
        decoder = (
            random_decoder(shape, device, weight_bits=WEIGHT_BITS) if request.decoder is None else request.decoder()
        )
        return IntegerScheme(decoder, pool)

    floats: dict[str, Builder] = {
        name: lambda fp8=name == "fp8": FloatScheme(shape, fp8, device, shape.positions, pool)  # type: ignore[misc]
        for name in BASELINES
        if name in request.against
    }
    return {**floats, "own": own}
