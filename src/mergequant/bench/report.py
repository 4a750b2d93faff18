"""What a run found: typed rows, tables for people, one JSON document for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from rich import box
from rich.table import Table

from mergequant.bench.roofline import Ceilings

__all__ = ["PHASES", "BenchReport", "Phase", "Row"]

Phase = Literal["memory", "gemm", "prefill", "decode", "e2e"]
PHASES: tuple[Phase, ...] = ("memory", "gemm", "prefill", "decode", "e2e")  # in this order, whatever is asked for


@dataclass(frozen=True)
class Row:
    """One figure. None: does not apply, or was not measured.

    Attributes:
        phase: what was measured.
        scheme: bf16, fp8, w4a8 (or w8a8 in `gemm`).
        batch: sequences; rows of the input in `gemm`.
        context: prompt tokens in prefill and e2e, attended positions in decode.
        kv: bits of a cached key or value.
        ms: milliseconds: of the prefill, of one decode step, of the whole generation, of one product.
        gb: 10^9 bytes: of memory, or read by a decode step.
        tops: 10^12 operations per second of the linear layers.
        gb_s: 10^9 bytes per second: bytes that a decode step must read, or weights of a product, per time.
        vs_bf16, vs_fp8: how many times faster than, or smaller than, that baseline in the same run.
        percent_of_ceiling: see `mergequant.bench.roofline`.
        kernels: what ran.
        what: the layer in `gemm`; weights, cache or peak in `memory`.
        mode: cold, burst or sustained in `gemm`.
        new_tokens: tokens generated, in e2e.
        spread: highest minus lowest pass as a share of the median.
    """

    phase: Phase
    scheme: str
    batch: int | None = None
    context: int | None = None
    kv: int | None = None
    ms: float | None = None
    gb: float | None = None
    tops: float | None = None
    gb_s: float | None = None
    vs_bf16: float | None = None
    vs_fp8: float | None = None
    percent_of_ceiling: float | None = None
    kernels: tuple[str, ...] = ()
    what: str | None = None
    mode: str | None = None
    new_tokens: int | None = None
    spread: float | None = None

    @property
    def tokens_s(self) -> float | None:
        """New tokens per second of all sequences together, in e2e."""
        if self.ms is None or self.batch is None or self.new_tokens is None:
            return None
        return self.batch * self.new_tokens / self.ms * 1e3

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, floats with four digits."""
        found = asdict(self)
        found["kernels"] = list(self.kernels)
        return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Row":
        """The row that `to_dict` wrote."""
        known = {item.name for item in fields(cls)}
        values: dict[str, Any] = {key: value for key, value in data.items() if key in known}
        return cls(**{**values, "kernels": tuple(data["kernels"])})


@dataclass
class BenchReport:
    """Everything that one `mergequant bench` found.

    Attributes:
        device: name, memory and clocks before and after.
        versions: of what took part.
        shape: name and sizes.
        ceilings: None on a CPU.
        rows: all figures.
        notes: what a reader of the rows must know.
        command: what makes them again.
        seconds: of the run.
    """

    device: dict[str, Any]
    versions: dict[str, Any]
    shape: dict[str, Any]
    ceilings: Ceilings | None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `mergequant bench`."""
        return {
            "device": self.device,
            "versions": self.versions,
            "shape": self.shape,
            "ceilings": self.ceilings.to_dict() if self.ceilings else None,
            "rows": [row.to_dict() for row in self.rows],
            "notes": self.notes,
            "command": self.command,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }

    def tables(self) -> list[Table]:
        """One table for the ceilings and one for each phase that was measured."""
        made = [] if self.ceilings is None else [_ceilings_table(self.ceilings)]
        for phase in PHASES:
            rows = [row for row in self.rows if row.phase == phase]
            if rows:
                made.append(_TABLES[phase](rows))
        return made


def _new_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for word in words:
        table.add_column(word, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


RATIOS = ("vs bf16", "vs fp8", "of ceiling", "spread")


def _ratios(row: Row) -> tuple[str, ...]:
    return (
        "-" if row.vs_bf16 is None else f"{row.vs_bf16:.2f}x",
        "-" if row.vs_fp8 is None else f"{row.vs_fp8:.2f}x",
        "-" if row.percent_of_ceiling is None else f"{row.percent_of_ceiling:.0f}%",
        "-" if row.spread is None else f"{row.spread:.1%}",
    )


def _number(value: float | None, form: str | None = None) -> str:
    if value is None:
        return "-"
    return (form or ("{:,.4g}" if abs(value) < 1000 else "{:,.0f}")).format(value)


def _scheme(row: Row) -> str:
    return row.scheme if row.kv is None else f"{row.scheme} kv{row.kv}"


def _cell(row: Row) -> str:
    new = f" + {row.new_tokens}" if row.new_tokens else ""
    return f"{row.batch} x {row.context}{new}"


def _ceilings_table(ceilings: Ceilings) -> Table:
    table = _new_table("ceilings, measured in this run", ["what"], ["burst", "sustained"])
    table.add_row("read, large, TB/s", "", f"{ceilings.read:.2f}")
    for size, rate in ceilings.read_by_size.items():
        table.add_row(f"read, one kernel, {size} MB, TB/s", "", f"{rate:.2f}")
    table.add_row("launch inside a graph, us", "", f"{ceilings.launch:.2f}")
    names = {"int8": "int8 wgmma, TOPS", "bf16": "bf16 cuBLAS, TOPS", "fp8": "fp8 cuBLAS, TOPS"}
    for kind, both in ceilings.rates.items():
        table.add_row(names[kind], f"{both.burst:,.0f}", f"{both.sustained:,.0f}")
    return table


def _speed_table(title: str, rate: str) -> Any:
    def make(rows: list[Row]) -> Table:
        table = _new_table(title, ["batch x context", "scheme"], ["ms", rate, *RATIOS])
        cell = None
        for row in rows:
            if cell not in (None, _cell(row)):
                table.add_section()
            shown = {"GB/s": row.gb_s, "TOPS": row.tops, "tokens/s": row.tokens_s}[rate]
            table.add_row("" if cell == _cell(row) else _cell(row), _scheme(row), _number(row.ms), *_rate(shown, row))
            cell = _cell(row)
        return table

    return make


def _rate(value: float | None, row: Row) -> tuple[str, ...]:
    return (_number(value, "{:,.0f}"), *_ratios(row))


def _gemm_table(rows: list[Row]) -> Table:
    columns = ["us", "TOPS", "GB/s", *RATIOS]
    table = _new_table("one linear layer", ["layer", "rows", "mode", "scheme"], columns)
    cell = None
    for row in rows:
        own = (row.what, row.batch, row.mode)
        if cell is not None and own != cell:
            table.add_section()
        names = ("", "", "") if own == cell else (str(row.what), str(row.batch), str(row.mode))
        micro = None if row.ms is None else row.ms * 1e3
        table.add_row(*names, row.scheme, _number(micro), _number(row.tops, "{:,.0f}"), *_rate(row.gb_s, row))
        cell = own
    return table


def _memory_table(rows: list[Row]) -> Table:
    table = _new_table("memory, each scheme alone on the device", ["what", "scheme"], ["GB", *RATIOS[:2]])
    for row in rows:
        where = f"{row.what}" if row.batch is None else f"{row.what}, decode {_cell(row)}"
        table.add_row(where, _scheme(row), _number(row.gb, "{:.3g}"), *_ratios(row)[:2])
    return table


_TABLES = {
    "prefill": _speed_table("prefill", "TOPS"),
    "decode": _speed_table("decode, per step", "GB/s"),
    "e2e": _speed_table("end to end: prompt + new tokens", "tokens/s"),
    "gemm": _gemm_table,
    "memory": _memory_table,
}
