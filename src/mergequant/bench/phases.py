"""Prefill, decode and end to end: all schemes of a cell in turns."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergequant.bench.report import Phase, Row
from mergequant.bench.roofline import Ceilings, decode_bytes, decode_floor, e2e_floor, prefill_floor
from mergequant.bench.schemes import Job, Scheme
from mergequant.bench.shapes import cache_bytes, linear_parameters
from mergequant.bench.timing import Timing, interleaved, ratio

__all__ = ["Cell", "Contest", "free"]

FILLED = 0.94  # share of the device's memory that caches may fill; graphs and libraries need some
BASELINES = ("bf16", "fp8")


@dataclass(frozen=True)
class Cell:
    """Sequences, and prompt tokens (prefill, e2e) or attended positions (decode)."""

    batch: int
    context: int


@dataclass(frozen=True)
class _Result:
    """A scheme's timing, and those of the baselines in the same round."""

    scheme: Scheme
    kv: int
    kernels: tuple[str, ...]
    timing: Timing
    others: dict[str, Timing]


@dataclass
class Contest:
    """Schemes that are timed against one another.

    Attributes:
        schemes: weights on the device, baselines first.
        kvs: bits of the caches that integer schemes are timed with.
        device: of all of them.
        passes: turns of each scheme.
        ceilings: for percentages; None without.
        notes: what could not be measured, and why; grows.
    """

    schemes: Sequence[Scheme]
    kvs: Sequence[int]
    device: torch.device
    passes: int
    ceilings: Ceilings | None
    notes: list[str]

    def prefill(self, cell: Cell) -> list[Row]:
        """Rows of one prefill; integer schemes with the narrowest cache."""
        rows = []
        operations = 2 * cell.batch * cell.context * linear_parameters(self.schemes[0].shape)
        for result in self._timed("prefill", cell, [min(self.kvs)]):
            scheme, floor = result.scheme, None
            if self.ceilings and scheme.kind in self.ceilings.rates:
                floor = prefill_floor(self.ceilings, scheme.shape, cell.batch, cell.context, scheme.kind)
            rows.append(_row("prefill", cell, result, floor, tops=operations / result.timing.ms / 1e9))
        return rows

    def decode(self, cell: Cell) -> list[Row]:
        """Rows of one decode step; integer schemes with every cache."""
        rows = []
        for result in self._timed("decode", cell, self.kvs):
            scheme = result.scheme
            size = (scheme.shape, cell.batch, cell.context, scheme.weight_bits, result.kv)
            moved, floor = decode_bytes(*size), None
            if self.ceilings and scheme.kind in self.ceilings.rates:
                floor = decode_floor(self.ceilings, *size, scheme.kind)
            rates = {"gb": moved / 1e9, "gb_s": moved / result.timing.ms / 1e6}
            rows.append(_row("decode", cell, result, floor, **rates))
        return rows

    def e2e(self, cell: Cell, new: int) -> list[Row]:
        """Rows of a whole generation; integer schemes with the narrowest cache."""
        rows = []
        for result in self._timed("e2e", cell, [min(self.kvs)], new):
            scheme, floor = result.scheme, None
            if self.ceilings and scheme.kind in self.ceilings.rates:
                size = (cell.batch, cell.context, new, scheme.weight_bits, result.kv)
                floor = e2e_floor(self.ceilings, scheme.shape, *size, scheme.kind)
            rows.append(_row("e2e", cell, result, floor, new_tokens=new))
        return rows

    def _timed(self, phase: str, cell: Cell, kvs: Sequence[int], new: int = 0) -> Iterator[_Result]:
        """Each scheme and cache once, with its own timing and those of the baselines in the same round."""
        seen = set()
        for group in self._rounds(cell, kvs, new):
            free(self.device)
            for result in self._round(phase, cell, group, new):
                if (result.scheme.name, result.kv) not in seen:
                    seen.add((result.scheme.name, result.kv))
                    yield result

    def _round(self, phase: str, cell: Cell, group: Sequence[tuple[Scheme, int]], new: int) -> list[_Result]:
        """Time a group in turns. Its memory is free again on return."""
        jobs: dict[str, tuple[Scheme, int, Job]] = {}
        for scheme, kv in group:
            try:
                if phase == "prefill":
                    job = scheme.prefill(cell.batch, cell.context, kv)
                elif phase == "decode":
                    job = scheme.decode(cell.batch, cell.context, kv)
                else:
                    job = scheme.generate(cell.batch, cell.context, new, kv)
            except torch.OutOfMemoryError:
                self.notes.append(
                    f"{phase} {cell.batch} x {cell.context}: {scheme.name} kv{kv} does not fit beside the others"
                )
                free(self.device)
            else:
                jobs[f"{scheme.name} kv{kv}"] = (scheme, kv, job)
        if not jobs:
            return []
        runs = {label: job.run for label, (_, _, job) in jobs.items()}
        found = interleaved(runs, self.device, self.passes, once=phase == "e2e")
        others = {name: found[label] for name in BASELINES if (label := f"{name} kv16") in found}
        return [_Result(scheme, kv, job.kernels, found[label], others) for label, (scheme, kv, job) in jobs.items()]

    def _rounds(self, cell: Cell, kvs: Sequence[int], new: int) -> list[list[tuple[Scheme, int]]]:
        """Who shares the device at a time: the baselines, whose cache is one, and as many others as fit."""
        floats = [(scheme, 16) for scheme in self.schemes if scheme.name in BASELINES]
        others = [
            (scheme, kv) for scheme in self.schemes if scheme.name not in BASELINES for kv in kvs if kv in scheme.caches
        ]
        if self.device.type != "cuda":
            return [floats + others]
        free(self.device)  # what the allocator keeps would look used
        available, _ = torch.cuda.mem_get_info(self.device)
        room = FILLED * available
        shape = self.schemes[0].shape
        sizes = {kv: cache_bytes(shape, cell.batch, cell.context + new, kv) for kv in (16, *kvs)}
        groups, group = [], list(floats)
        used = start = sizes[16] if floats else 0
        for scheme, kv in others:
            size = 0 if kv == 16 and floats and not new else sizes[kv]  # shares the baselines' cache
            if used + size > room and len(group) > len(floats):
                groups.append(group)
                group, used = list(floats), start
            group.append((scheme, kv))
            used += size
        return [*groups, group]


def _row(phase: Phase, cell: Cell, result: _Result, floor: float | None, **rest: Any) -> Row:
    """What every phase says of a timing; `rest` is its own."""
    timing, others = result.timing, result.others
    return Row(
        phase=phase,
        scheme=result.scheme.name,
        batch=cell.batch,
        context=cell.context,
        kv=result.kv,
        ms=timing.ms,
        vs_bf16=ratio(others["bf16"], timing) if "bf16" in others else None,
        vs_fp8=ratio(others["fp8"], timing) if "fp8" in others else None,
        percent_of_ceiling=None if floor is None else 100 * floor / timing.ms,
        kernels=result.kernels,
        spread=timing.spread,
        **rest,
    )


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
