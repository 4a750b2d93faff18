"""What the weight-only family is to show: claims, and D against stored bits with its Pareto front, for `render.py`.

The runs are those of `accuracy.py --suite weights`.
"""

import hashlib
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from family import GOAL_TEXT, Order, mean_and_spread, provenance, values, verdicts
from suites import CMPQ_BITS

from mergequant.comparison.picture import Point, pareto_front, picture

__all__ = ["LAYERS", "MODELS", "ORDERS", "draw_pareto", "layers", "orders", "pareto", "stale_pictures", "times"]

MODELS = ("ref", "ref_outlier", "tiny")
AXIS = "stored bits per weight (linear layers: codes, scales, codebooks, outliers, indices)"
FOUR_BITS, NEAR_LOSSLESS = "spqr W3 + 0.5 %", "spqr W4 g32 + 0.5 %"
ONE_PERCENT = "1 % of perplexity"
# Of D. What divides no width of a model is refused there, so 2 bits are judged in groups of 64 too.
ORDERS = (
    *(
        Order(left, right)
        for group in ("g128", "g64")
        for left, right in (
            ("vptq v4k256", f"gptq W2 {group}"),
            ("vptq v8k256+256", f"gptq W2 {group}"),
            (f"gptq W2 {group}", f"rtn W2 {group}"),
        )
    ),
    Order("quantease W3", "gptq W3, natural order"),
    Order("quantease W3", "gptq W3", (1.1,)),
    Order("quantease W3, from gptq", "gptq W3"),
    Order("quantease W3 + 1 %", "quantease W3"),
    Order(FOUR_BITS, "gptq W4"),
    Order(NEAR_LOSSLESS, ONE_PERCENT),
    *(Order(f"cmpq, {more:.1f} bits", f"cmpq, {less:.1f} bits") for less, more in pairwise(CMPQ_BITS)),
    *(
        Order(f"adadim W3{rounding}", f"adadim W3{rounding}, {axis}")
        for rounding in ("", " rtn")
        for axis in ("rows", "columns")
    ),
    *(
        Order(f"{left} {bits}", f"{right} {bits}")
        for bits in ("W4", "W3")
        for left, right in (("nupes", "powerquant"), ("powerquant", "rtn"))
    ),
    *(Order("gwq W3", f"gwq W3, {chosen}") for chosen in ("random", "none", "magnitude")),
    Order("gwq W3, gptq", "gwq W3, gptq, by error"),
    Order("dmmv W3", "gptq W3"),
)
# Of the error at the outputs of layers, unless `FIGURES` says else.
LAYERS = (
    Order("vptq v4k256", "gptq W2 g64", (1 / 6,)),
    Order("vptq v8k256+256", "gptq W2 g64", (1 / 6,)),
    Order("quantease W3", "gptq W3, natural order", (0.89,)),
    Order("quantease W3", "gptq W3", (1.1,)),
    Order("quantease W3 + 1 %", "quantease W3", (0.85,)),
    Order("adadim W3", "adadim W3, rows"),
    Order("adadim W3", "adadim W3, columns"),
    Order("dmmv W3: worst token", "its start, gptq W3: worst token", (0.92,)),
    Order("dmmv W3", "gptq W3"),
    Order(f"stored bits of {FOUR_BITS}", "4.0"),
    Order(f"stored bits of {NEAR_LOSSLESS}", "4.65"),
)
FIGURES = {
    "dmmv W3: worst token": ("dmmv W3", "worst_error"),
    "its start, gptq W3: worst token": ("dmmv W3", "worst_error_start"),
    **{f"stored bits of {label}": (label, "linear_bits_per_parameter") for label in (FOUR_BITS, NEAR_LOSSLESS)},
}
NUMBERS = {ONE_PERCENT: math.log(1.01), "4.0": 4.0, "4.65": 4.65}  # what is no recipe
# Of `block_time.py`: most seconds for a block, and what models are made of.
SECONDS = {"gptq": 10, "quantease": 25, "spqr": 20, "vptq": 60}
SMALL, LARGE = "llama-2-7b", "llama-2-70b-layer"
BLOCKS = {SMALL: 32, LARGE: 80}


def orders(runs: dict[str, Any]) -> str:
    """Claims about D, on all models and texts."""
    texts = list(dict.fromkeys(name for row in runs["rows"] for name in row["eval"]))
    return verdicts(ORDERS, MODELS, texts, lambda *what: _number(what[0]) or values(runs, *what))


def layers(runs: dict[str, Any]) -> str:
    """Claims about layers: their output errors (means over all sites of a model), worst tokens, stored bits."""

    def read(label: str, model: str, _: str) -> list[float]:
        own, figure = FIGURES.get(label, (label, "output_error"))
        rows = [row for row in runs["rows"] if (row["label"], row["model"]) == (own, model)]
        found = [row.get(figure, row.get("sites", {}).get(figure)) for row in rows]
        return _number(label) or [value for value in found if value is not None]

    return verdicts(LAYERS, MODELS, ["layers"], read, "the figure")


def pareto(runs: dict[str, Any]) -> str:
    """All recipes by stored bits, what is on a model's front in bold, and the pictures."""
    found = {model: {point.name: point for point in _points(runs, model)} for model in _models(runs)}
    fronts = {model: pareto_front(list(points.values())) for model, points in found.items()}
    heads = [f"{what} {model}" for model in found for what in ("bits,", "D,")]
    lines = ["| recipe | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    labels = {label: point.bits for points in reversed(found.values()) for label, point in points.items()}
    for label in sorted(labels, key=lambda label: (labels[label], label)):
        cells = []
        for model, points in found.items():
            point = points.get(label)
            shown = mean_and_spread(values(runs, label, model, GOAL_TEXT))
            cells += [
                "-" if point is None else f"{point.bits:.2f}",
                f"**{shown}**" if point in fronts[model] else shown,
            ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    seen = [f"![D against stored bits, {model}]({_file(model)})" for model in found]
    note = (
        f"D in nats on {GOAL_TEXT}, mean over seeds ± half of highest minus lowest; stored bits per weight of linear "
        "layers, everything counted. Bold: no other recipe has fewer bits and no larger D on that model. "
        f"{provenance(runs)}"
    )
    return "\n".join([*lines, "", note, "", *seen]) + "\n"


def draw_pareto(runs: dict[str, Any], folder: Path) -> None:
    """Write a picture per model. Raises RuntimeError without matplotlib."""
    for model in _models(runs):
        points = _points(runs, model)
        title = f"Weight-only recipes, {model}, {GOAL_TEXT}"
        made = picture(points, title, axis=AXIS, front=True, description=_digest(points))
        if made is None:
            raise RuntimeError("pictures of docs/results.md need matplotlib: pip install mergequant[plots]")
        (folder / _file(model)).write_bytes(made)


def stale_pictures(runs: dict[str, Any], folder: Path) -> list[str]:
    """Names of pictures that do not show these runs; each file holds a digest of what it shows."""
    return [
        _file(model)
        for model in _models(runs)
        if not (path := folder / _file(model)).is_file()
        or _digest(_points(runs, model)).encode() not in path.read_bytes()
    ]


def times(run: dict[str, Any]) -> str:
    """Seconds of one block by recipe, and what whole models would take."""
    found = {(row["shape"], row["recipe"]): row for row in run["rows"]}
    both = [name for shape, name in found if shape == LARGE and (SMALL, name) in found]
    growth = [found[LARGE, name]["seconds"] / found[SMALL, name]["seconds"] for name in both]
    lines = [
        "| recipe | 7B block, s | asked | bits | peak, GB | 7B, 32 blocks | 70B block, s | 70B, 80 blocks |",
        "|---" * 8 + "|",
    ]
    for name in dict.fromkeys(name for _, name in found):
        small, large = found.get((SMALL, name)), found.get((LARGE, name))
        cells = ["-"] * 7
        if small is not None:
            limit = SECONDS.get(name)
            met = "" if limit is None else " (met)" if small["seconds"] <= limit else " (missed)"
            cells[0] = f"{small['seconds']:.1f}{met}"
            cells[1] = "-" if limit is None else f"{limit}"
            cells[2] = f"{small['linear_bits_per_parameter']:.2f}"
            cells[3] = f"{small['peak_memory_bytes'] / 1e9:.1f}"
            cells[4] = _minutes(small["seconds"] * BLOCKS[SMALL])
        if large is not None:
            cells[5], cells[6] = f"{large['seconds']:.1f}", _minutes(large["seconds"] * BLOCKS[LARGE])
        elif small is not None and growth:
            scaled = small["seconds"] * max(growth)
            cells[5], cells[6] = f"about {scaled:.0f}", f"about {_minutes(scaled * BLOCKS[LARGE])}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = (
        f"{run['protocol']}; steps that learn from them included. Models: so many times the block, without reading, "
        "proofs and verifying. About: not run; the time of the 7B block times the largest growth from one block to the "
        f"other that was measured ({', '.join(f'{name} {one:.1f}x' for name, one in zip(both, growth)) or 'none'}). "
        f"`{run['command']}` on {run['device']['name']}, torch {run['versions']['torch']}."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(label: str) -> list[float]:
    return [NUMBERS[label]] if label in NUMBERS else []


def _models(runs: dict[str, Any]) -> list[str]:
    measured = {row["model"] for row in runs["rows"]}
    return [model for model in MODELS if model in measured]


def _points(runs: dict[str, Any], model: str) -> list[Point]:
    """Mean D on the main text by mean stored bits, a point per recipe, in the order of the suite."""
    own = [row for row in runs["rows"] if row["model"] == model]
    points = []
    for label in (label for label in runs["order"] if any(row["label"] == label for row in own)):
        rows = [row for row in own if row["label"] == label]
        bits = statistics.mean(row["linear_bits_per_parameter"] for row in rows)
        points.append(Point(label, bits, statistics.mean(values(runs, label, model, GOAL_TEXT)), rows[0]["recipe"]))
    return points


def _digest(points: list[Point]) -> str:
    return hashlib.sha256(repr(points).encode()).hexdigest()


def _file(model: str) -> str:
    return f"weights_{model}.png"
