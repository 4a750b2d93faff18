"""The papers' own figures beside ours, each with its setting, so that a reader sees what may be compared."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mergequant.recipes import Figure

__all__ = ["PAPERS", "PAPER_COLUMNS", "paper_increase", "paper_lines"]

PAPERS = (
    "Figures of the papers in their own settings, and ours: perplexities and accuracies of different models cannot be "
    "compared; D, where the paper tells the float model's perplexity, shows whether the order is alike."
)
PAPER_COLUMNS = ["recipe", "the paper's figure", "value", "its D", "its setting", "source", "ours", "our D"]
PAPER_COLUMNS += ["our setting"]
FLOAT_VALUE = re.compile(r"float ([\d.]*\d)")


def paper_increase(figure: Figure) -> float | None:
    """D of a paper's perplexity, where its setting tells the float model's as "float 5.47"; else None."""
    told = FLOAT_VALUE.search(figure.setting)
    if told is None or "perplexity" not in figure.metric.lower():
        return None
    return math.log(figure.value / float(told[1]))


def paper_lines(row: Mapping[str, Any], expected: Sequence[Figure], where: str) -> list[list[str]]:
    """A line of `PAPER_COLUMNS` for each figure of a row's recipe; `where` is our model and text."""
    bits = "" if row["reason"] else f", W{row['linear_bits_per_parameter']:.1f}A{row['activation_bits']:.1f}"
    lines = []
    for figure in expected:
        increase = paper_increase(figure)
        told = [figure.metric, f"{figure.value:g}", "-" if increase is None else f"{increase:.3f}", figure.setting]
        lines.append([row["recipe"], *told, figure.source, *_ours(figure, row), where + bits])
    return lines


def _ours(figure: Figure, row: Mapping[str, Any]) -> tuple[str, str]:
    """Our figure of the same kind, and our D."""
    metric = figure.metric.lower()
    if "perplexity" in metric and row["perplexity"] is not None:
        return f"perplexity {row['perplexity']:.2f}", f"{row['nll_increase']:.3f}"
    choices = {name: task["accuracy"] for name, task in row["tasks"].items() if task["chance"] is not None}
    if "zero-shot" in metric and choices and None not in choices.values():
        return f"mean of {', '.join(choices)} {100 * statistics.fmean(choices.values()):.1f}", "-"
    return "-", "-"
