"""The picture of a comparison: error against bits, drawn by matplotlib, which is optional."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NO_PICTURE", "Point", "picture"]

NO_PICTURE = "no picture: matplotlib is not installed; run `pip install mergequant[plots]` and the same command again"


@dataclass(frozen=True)
class Point:
    """A recipe: stored bits per weight of the linear layers plus bits of their inputs, and D in nats."""

    name: str
    bits: float
    nll_increase: float


def picture(points: Sequence[Point], title: str) -> bytes | None:
    """A PNG, or None without matplotlib. The axis of D is logarithmic where all D are positive."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter([point.bits for point in points], [point.nll_increase for point in points], s=28)
    for point in points:
        at = (point.bits, point.nll_increase)
        # A name may hold `$` or `_`, which are no mathematics here.
        axes.annotate(point.name, at, textcoords="offset points", xytext=(5, 4), fontsize=8, parse_math=False)
    if points and all(point.nll_increase > 0 for point in points):
        axes.set_yscale("log")
    else:
        axes.axhline(0, linewidth=0.8, color="0.6")
    axes.set_xlabel("bits per weight (linear layers, all stored) + bits per activation")
    axes.set_ylabel("increase of the mean NLL over float, nats")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.2)
    made = io.BytesIO()
    figure.savefig(made, format="png", metadata={"Software": None})
    return made.getvalue()
