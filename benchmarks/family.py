"""What the channel family is to show: marks and orderings, judged from the runs, and their tables for `render.py`.

The runs are those of `accuracy.py --suite family`, and of `planted.py`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "GOAL_TEXT",
    "MODELS",
    "Order",
    "Reader",
    "absent",
    "judge",
    "marks",
    "mean_and_spread",
    "orders",
    "papers",
    "planted",
    "provenance",
    "values",
    "verdicts",
]

GOAL_TEXT = "wikitext2_test"

MODELS = ("ref", "ref_outlier")
QUAROT, QUAROT_MORE = "quarot", "quarot, clip search, Hessian of codes, prefix"
PLUS, W4A8, SMOOTH, OS_PLUS = "mergequant-plus", "mergequant-w4a8", "smoothquant", "outlier-suppression-plus"
# D on WikiText-2 test, `ref` and `ref_outlier`: at most.
MARKS: dict[str, tuple[float, float]] = {
    "gptq W4A16": (0.022, 0.028),
    QUAROT: (0.075, 0.125),
    QUAROT_MORE: (0.058, 0.095),
    "outliertune W8A8": (0.005, 0.005),
    "outliertune W6A6": (0.03, 0.03),
    "prefixquant": (0.12, 0.15),
}
# Likewise: what a prototype gave, no mark.
ABOUT: dict[str, tuple[float, float]] = {"smoothquant W4A4": (0.31, 0.37), "outliertune W4A4": (0.23, 0.33)}


@dataclass(frozen=True)
class Order:
    """A figure of `left` is at most `factor` (one for each model, or one for all) times that of `right`."""

    left: str
    right: str
    factor: tuple[float, ...] = (1.0,)

    def __str__(self) -> str:
        scaled = "" if set(self.factor) == {1.0} else " x " + " / x ".join(f"{one:.3g}" for one in self.factor)
        return f"{self.left} <= {self.right}{scaled}"


Reader = Callable[[str, str, str], list[float]]  # of a label, a model and what is measured: its values over seeds


ORDERS = (
    Order(PLUS, QUAROT),
    Order(PLUS, QUAROT_MORE),
    Order(W4A8, "gptq W4A16", (1.5, 1.0)),
    Order(W4A8, "gptq W4A16, channels scaled, prefix"),
    Order(W4A8, "qserve W4A8"),
    Order("flatquant, prefix", QUAROT_MORE),
    Order(PLUS, "flatquant"),
    Order(PLUS, "flatquant, prefix"),
    Order(f"{PLUS}, o/d with token scales", "flatquant, prefix"),
    Order(f"{PLUS}, fine-tuned", PLUS),
    Order(PLUS, "prefixquant"),
    *(
        Order(f"{name} {bits}", f"{SMOOTH} {bits}")
        for name in (OS_PLUS, "qllm", "outliertune")
        for bits in ("W6A6", "W4A4")
    ),
    *(Order(f"{OS_PLUS} {bits}, token clips", f"{SMOOTH} {bits}, token clips") for bits in ("W6A6", "W4A4")),
    Order("mergequant", "outliertune W4A4"),
)


def values(runs: dict[str, Any], label: str, model: str, text: str) -> list[float]:
    """D of a recipe over seeds, on one text."""
    return [row["eval"][text]["d"] for row in runs["rows"] if (row["label"], row["model"]) == (label, model)]


def judge(left: list[float], right: list[float], factor: float) -> str:
    """Whether mean(left) <= factor * mean(right), and whether the seeds' ranges leave a doubt."""
    bound = [factor * value for value in right]
    if statistics.mean(left) <= statistics.mean(bound):
        return "holds" if max(left) < min(bound) else "holds, within the spread"
    return "fails" if min(left) > max(bound) else "fails, within the spread"


def mean_and_spread(values: list[float]) -> str:
    """For a table: the mean, and half of highest minus lowest."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def provenance(runs: dict[str, Any]) -> str:
    """Where the runs' texts and figures come from, rows of other devices than the last call's included."""
    machine = ", ".join(f"{key} {value}" for key, value in runs["machine"].items())
    elsewhere: dict[str, list[str]] = {}
    for row in runs["rows"]:
        if row.get("device", runs["machine"]["device"]) != runs["machine"]["device"]:
            elsewhere.setdefault(row["device"], []).append(f"{row['label']} ({row['model']})")
    others = "".join(f" Run on {device}: {'; '.join(dict.fromkeys(names))}." for device, names in elsewhere.items())
    return (
        f"Calibration: {runs['protocol']['calibration']}. Evaluation: {runs['protocol']['evaluation']}. Made by "
        f"`{runs['command']}` on {machine}.{others}"
    )


def marks(runs: dict[str, Any]) -> str:
    """Marks that single recipes were to reach, and the figures of a prototype."""
    lines = ["| recipe | asked | `ref` | `ref_outlier` |", "|---|---|---|---|"]
    for title, levels in (("at most", MARKS), ("about", ABOUT)):
        for label, bounds in levels.items():
            cells = []
            for model, bound in zip(MODELS, bounds):
                found = values(runs, label, model, GOAL_TEXT)
                reached = statistics.mean(found) if found else None
                met = "" if title == "about" or reached is None else " (met)" if reached <= bound else " (missed)"
                cells.append("not measured" if reached is None else mean_and_spread(found) + met)
            asked = " / ".join(f"{bound:.3f}" for bound in bounds)
            lines.append(f"| {label} | {title} {asked} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def orders(runs: dict[str, Any]) -> str:
    """Ordering claims, each judged on both models and all texts, with the spread over seeds."""
    texts = list(dict.fromkeys(name for row in runs["rows"] for name in row["eval"]))
    return verdicts(ORDERS, MODELS, texts, lambda label, model, text: values(runs, label, model, text))


def verdicts(
    claims: Sequence[Order], models: Sequence[str], measured: Sequence[str], read: Reader, name: str = "D"
) -> str:
    """A table: a row per claim, a column per model and what is measured, which the note below calls `name`."""
    columns = [f"{model}, {what}" for model in models for what in measured]
    lines = ["| claim | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for claim in claims:
        factors = claim.factor * (len(models) // len(claim.factor))
        cells = []
        for model, factor in zip(models, factors, strict=True):
            for what in measured:
                left, right = (read(label, model, what) for label in (claim.left, claim.right))
                if left and right:
                    ratio = statistics.mean(left) / statistics.mean(right)
                    cells.append(f"{judge(left, right, factor)} ({ratio:.2f}x)")
                else:
                    cells.append("not measured")
        lines.append(f"| {claim} | " + " | ".join(cells) + " |")
    note = (
        f"In brackets {name} of the left one over that of the right one, means over seeds. Within the spread: the "
        "seeds' ranges overlap."
    )
    return "\n".join([*lines, "", note]) + "\n"


def papers(runs: dict[str, Any]) -> str:
    """The papers' own figures with their settings, beside D of our rows of the same recipe."""
    names = {row["label"]: row["recipe"] for row in runs["rows"]}
    names = {label: names[label] for label in sorted(names, key=runs["order"].index)}
    lines = ["| recipe | the paper's figure | value | its D | its setting | source |", "|---|---|---|---|---|---|"]
    ours = ["| recipe | ours | " + " | ".join(f"`{model}`" for model in MODELS) + " |", "|---|---|---|---|"]
    for name in dict.fromkeys(names.values()):
        for figure in runs["expected"].get(name, ()):
            told = "-" if figure["nll_increase"] is None else f"{figure['nll_increase']:.3f}"
            cells = [name, figure["metric"], f"{figure['value']:g}", told, figure["setting"], figure["source"]]
            lines.append("| " + " | ".join(cells) + " |")
        for label in (label for label, own in names.items() if own == name):
            found = [mean_and_spread(values(runs, label, model, GOAL_TEXT)) for model in MODELS]
            ours.append(f"| {name} | {label} | " + " | ".join(found) + " |")
    return "\n".join([*lines, "", f"Ours, D on {GOAL_TEXT}:", "", *ours]) + "\n"


def absent(runs: dict[str, Any]) -> str:
    """Recipes of the suite without figures, with the reason."""
    lines = [f"- {label}: {reason}" for label, reason in runs["left_out"].items()]
    for model, found in runs.get("refused", {}).items():
        lines += [f"- {label} on {model}: {reason}" for label, reason in found.items()]
    return "\n".join(lines or ["None."]) + "\n"


def planted(runs: dict[str, Any]) -> str:
    """A column per planted structure, a row per recipe; what wins or stays is in bold."""
    rows = {(row["structure"], row["label"]): row["kl"] for row in runs["rows"]}
    names = list(runs["structures"])
    lines = ["| recipe | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label in runs["order"]:
        cells = []
        for name in names:
            kl = rows.get((name, label))
            shown = "-" if kl is None else f"{statistics.mean(kl):.4f} ± {(max(kl) - min(kl)) / 2:.4f}"
            cells.append(f"**{shown}**" if label in runs["winners"][name] else shown)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    told = [f"- {name}: {text}" for name, text in runs["structures"].items()]
    claims = ["| claim | KL of the one over the other's, worst seed | asked | |", "|---|---|---|---|"]
    for claim in runs["claims"]:
        verdict = "holds" if claim["holds"] else ": ".join(filter(None, ("**fails**", claim["why"])))
        claims.append(f"| {claim['text']} | {claim['ratio']:.2f} | <= {claim['factor']:g} | {verdict} |")
    where = f"`{runs['command']}`; {runs['about']}."
    return "\n".join([*lines, "", *told, "", *claims, "", where]) + "\n"
