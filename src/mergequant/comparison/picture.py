"""The picture of a comparison: error against bits, drawn by matplotlib, which is optional."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NO_PICTURE", "Point", "pareto_front", "picture"]

NO_PICTURE = "no picture: matplotlib is not installed; run `pip install mergequant[plots]` and the same command again"
STORED_AND_INPUTS = "bits per weight (linear layers, all stored) + bits per activation"
MARKERS = "os^Dv<>pP*Xhd8"


@dataclass(frozen=True)
class Point:
    """A recipe: bits, D in nats, and the group whose mark it bears ("" = all points look alike).

    Bits are stored bits per weight of the linear layers plus bits of their inputs, unless the picture's axis says else.
    """

    name: str
    bits: float
    nll_increase: float
    group: str = ""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one undercuts in bits without a larger D, by rising bits."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.nll_increase)):
        if not best or point.nll_increase < best[-1].nll_increase:
            best.append(point)
    return best


def picture(
    points: Sequence[Point],
    title: str,
    *,
    axis: str = STORED_AND_INPUTS,
    front: bool = False,
    description: str | None = None,
) -> bytes | None:
    """A PNG, or None without matplotlib. The axis of D is logarithmic where all D are positive.

    axis: what bits count; front: join the Pareto front and name only its points; description: stored in the file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, group in enumerate(dict.fromkeys(point.group for point in points)):
        own = [point for point in points if point.group == group]
        places = [point.bits for point in own], [point.nll_increase for point in own]
        axes.scatter(*places, s=28, marker=MARKERS[number % len(MARKERS)], label=group or None)
    named = pareto_front(points) if front else points
    if front:
        line = [point.bits for point in named], [point.nll_increase for point in named]
        axes.plot(*line, linewidth=0.8, color="0.4", zorder=0)
    # No point lies below and left of the front. A name may hold `$` or `_`, which are no mathematics here.
    where: dict[str, Any] = {"xytext": (-5, -4), "ha": "right", "va": "top"} if front else {"xytext": (5, 4)}
    for point in named:
        at = (point.bits, point.nll_increase)
        axes.annotate(point.name, at, textcoords="offset points", fontsize=8, parse_math=False, **where)
    if points and all(point.nll_increase > 0 for point in points):
        axes.set_yscale("log")
    else:
        axes.axhline(0, linewidth=0.8, color="0.6")
    if any(point.group for point in points):
        axes.legend(fontsize=8, ncols=2)
    axes.set_xlabel(axis)
    axes.set_ylabel("increase of the mean NLL over float, nats")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.2)
    made = io.BytesIO()
    figure.savefig(made, format="png", metadata={"Software": None, "Description": description})
    return made.getvalue()
