"""Table of docs/results.md from the run of `weight_only.py`: times of weight-only kernels, and what was asked."""

from typing import Any

__all__ = ["SHOWN_TOKENS", "crossing", "table"]

SHOWN_TOKENS = (1, 4, 8, 16)
SPARSE = "sparse"
FLOATS, DECODED = "bf16", "decode_then_multiply"
# At one token: times as fast as bf16 at every shape, to accept and to aim for; and most that outliers may add.
GOALS = {SPARSE: (1.5, 2.2), "v6k4096": (2.0, 3.0), "v4k256": (2.0, 3.0), "v8k256+256": (2.0, 3.0)}
MOST_OVERHEAD = 0.35


def table(run: dict[str, Any]) -> str:
    """Goals, then microseconds by layout, tokens and shape."""
    ops, shapes, counts = (list(dict.fromkeys(row[key] for row in run["rows"])) for key in ("op", "shape", "tokens"))
    lines = [*_goals(run, ops), "", "| layout | tokens | " + " | ".join(shapes) + " | outliers |"]
    lines.append("|---" * (len(shapes) + 3) + "|")
    for op in ops:
        for tokens in (count for count in SHOWN_TOKENS if count in counts):
            own = [_row(run, op, shape, tokens) for shape in shapes]
            cells = [f"{row['kernel']:.1f} ({row[FLOATS] / row['kernel']:.2f}x)" for row in own]
            lines.append(f"| {op} | {tokens} | " + " | ".join([*cells, _extent(_overheads(own), "{:+.0%}")]) + " |")
        cells = [
            _extent([_row(run, op, shape, tokens)[DECODED] for tokens in counts], "{:.0f}") for shape in shapes
        ]  # hardly grows with the tokens
        lines.append(f"| {op}, decoded first | {counts[0]} to {counts[-1]} | " + " | ".join([*cells, "-"]) + " |")
        if "read_tb_s" in run:
            least = [_row(run, op, shape, counts[0])["bytes"] / run["read_tb_s"] / 1e6 for shape in shapes]
            lines.append(f"| {op}, reading alone | - | " + " | ".join([*(f"{time:.1f}" for time in least), "-"]) + " |")
    faster = ", ".join(f"{op} {crossing(run, op)}" for op in ops)
    note = (
        "Microseconds, and times as fast as bf16 (cuBLAS) in the same run; outliers: what they add to the time. "
        f"Tokens, of those measured, up to which the kernel is faster at every shape than decoding first: {faster}. "
        f"`{run['command']}` on {run['device']['name']}, "
        + ", ".join(f"{key} {run['versions'][key]}" for key in ("torch", "triton", "driver"))
    )
    return "\n".join([*lines, "", f"{note}."]) + "\n"


def crossing(run: dict[str, Any], op: str) -> int:
    """The most tokens up to which, of those measured, a kernel is faster at every shape than decoding first; or 0."""
    slower = {row["tokens"] for row in run["rows"] if row["op"] == op and row["kernel"] > row[DECODED]}
    first = min(slower, default=float("inf"))
    return max((row["tokens"] for row in run["rows"] if row["op"] == op and row["tokens"] < first), default=0)


def _goals(run: dict[str, Any], ops: list[str]) -> list[str]:
    lines = ["| at one token | accept | target | reached |", "|---|---|---|---|"]
    for op in ops:
        found = [row[FLOATS] / row["kernel"] for row in run["rows"] if (row["op"], row["tokens"]) == (op, 1)]
        met = [level for level, bound in zip(("accept", "target"), GOALS[op]) if min(found) >= bound]
        cells = [*(f"{bound:.1f}x" for bound in GOALS[op]), f"{_extent(found, '{:.2f}x')} ({(met or ['missed'])[-1]})"]
        lines.append(f"| {op}, against bf16 | " + " | ".join(cells) + " |")
    found = _overheads([row for row in run["rows"] if row["tokens"] == 1])
    shown = f"{_extent(found, '{:+.0%}')} ({'accept' if max(found) <= MOST_OVERHEAD else 'missed'})"
    return [*lines, f"| what outliers add | {MOST_OVERHEAD:+.0%} | - | {shown} |"]


def _overheads(rows: list[dict[str, Any]]) -> list[float]:
    return [row["kernel"] / row["without_outliers"] - 1 for row in rows if "without_outliers" in row]


def _extent(values: list[float], form: str) -> str:
    """Lowest and highest."""
    shown = [form.format(value) for value in sorted(values)]
    return " to ".join(dict.fromkeys([*shown[:1], *shown[-1:]])) or "-"


def _row(run: dict[str, Any], op: str, shape: str, tokens: int) -> dict[str, Any]:
    return next(row for row in run["rows"] if (row["op"], row["shape"], row["tokens"]) == (op, shape, tokens))
