"""What each scheme keeps on the device, measured with no other scheme there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mergequant.bench.phases import Cell, free
from mergequant.bench.report import Row
from mergequant.bench.schemes import Builder, Scheme
from mergequant.bench.shapes import cache_bytes

__all__ = ["measure_memory"]

KINDS = ("weights", "cache", "peak")


def measure_memory(
    builders: Mapping[str, Builder], cells: Sequence[Cell], kvs: Sequence[int], device: torch.device
) -> list[Row]:
    """Bytes of weights, and the allocator's peak in a decode step of every cell.

    The peak counts weights, cache, buffers and the graph's memory, as `torch.cuda.max_memory_allocated` does. On a CPU
    weights and caches are counted, and there is no peak.
    """
    rows: list[Row] = []
    for build in builders.values():
        rows += _one(build, cells, kvs, device)
    order = sorted(rows, key=lambda row: (KINDS.index(str(row.what)), row.batch or 0, row.context or 0))
    return [_compared(row, rows) for row in order]


def _one(build: Builder, cells: Sequence[Cell], kvs: Sequence[int], device: torch.device) -> list[Row]:
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    scheme = build()
    rows = [Row("memory", scheme.name, gb=scheme.weight_bytes / 1e9, what="weights")]
    for cell in cells:
        for kv in scheme.caches if len(scheme.caches) == 1 else kvs:
            where: dict[str, Any] = {"batch": cell.batch, "context": cell.context, "kv": kv}
            size = cache_bytes(scheme.shape, cell.batch, cell.context, kv)
            rows.append(Row("memory", scheme.name, gb=size / 1e9, what="cache", **where))
            if device.type == "cuda":
                peak = _peak(scheme, cell, kv, device) - before
                rows.append(Row("memory", scheme.name, gb=peak / 1e9, what="peak", **where))
    del scheme
    free(device)
    return rows


def _peak(scheme: Scheme, cell: Cell, kv: int, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    job = scheme.decode(cell.batch, cell.context, kv)
    job.run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del job
    free(device)
    return peak


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """With how many times smaller it is than each baseline."""

    def times(name: str) -> float | None:
        for other in rows:
            if other.scheme == name and (other.what, other.batch, other.context) == (row.what, row.batch, row.context):
                return other.gb / row.gb if other.gb and row.gb else None
        return None

    return replace(row, vs_bf16=times("bf16"), vs_fp8=times("fp8"))
