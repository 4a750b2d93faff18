"""Measure speed and memory against strong bf16 and fp8 baselines, in one run, in turns."""

from mergequant.bench.gemm import GEMM_ROWS
from mergequant.bench.phases import BASELINES, Cell
from mergequant.bench.report import PHASES, BenchReport, Phase, Row
from mergequant.bench.roofline import Ceilings, Rate
from mergequant.bench.run import CELLS, NEW_TOKENS, Request, run_bench
from mergequant.bench.shapes import SHAPES, folder_shape, named_shape, parameters

__all__ = [
    "BASELINES",
    "CELLS",
    "GEMM_ROWS",
    "NEW_TOKENS",
    "PHASES",
    "SHAPES",
    "BenchReport",
    "Ceilings",
    "Cell",
    "Phase",
    "Rate",
    "Request",
    "Row",
    "folder_shape",
    "named_shape",
    "parameters",
    "run_bench",
]
