"""Tables of docs/results.md from the runs under benchmarks/results/.

    python benchmarks/render.py            # rewrite the tables in docs/results.md
    python benchmarks/render.py --check    # exit 1 if the document and the runs disagree

The document holds markers `<!-- KIND:FILE -->` and `<!-- end -->`, KIND being accuracy, goals, linear or quantize; what
stands between them is made here and is not edited by hand.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- (\w+):(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
GOAL_TEXT = "wikitext2_test"
# Increase of the mean NLL on `ref` and `ref_outlier`: to accept, to aim for, and beyond (None: not set).
GOALS: dict[str, tuple[tuple[float | None, float | None], ...]] = {
    "gptq W4A16": ((0.022, 0.028), (0.015, 0.023), (None, None)),
    "mergequant": ((0.27, 0.25), (0.22, 0.20), (None, None)),
    "mergequant-plus": ((0.065, 0.072), (0.053, 0.060), (0.045, 0.048)),
    "mergequant-plus, o/d int8 by QSM": ((0.060, 0.065), (0.052, 0.054), (0.036, 0.038)),
    "mergequant-w4a8": ((0.024, 0.022), (0.016, 0.013), (0.012, 0.010)),
}


def table(runs: dict[str, Any]) -> str:
    """One Markdown table: a row per recipe, mean and spread (highest minus lowest) over seeds, per model and text."""
    rows = runs["rows"]
    models = sorted({row["model"] for row in rows})
    texts = list(dict.fromkeys(name for row in rows for name in row["eval"]))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    labels.sort(key=runs["order"].index)
    columns = [f"{model}, {text}" for model in models for text in texts]
    lines = ["| recipe | " + " | ".join(columns) + " | KL | top-1 | linear bits |"]
    lines.append("|---|" + "---|" * (len(columns) + 3))
    floats = {(row["model"], text): row["eval"][text]["float_perplexity"] for row in rows for text in texts}
    shown = " | ".join(f"ppl {floats[model, text]:.2f}" for model in models for text in texts)
    lines.append(f"| float | {shown} | - | - | 16 |")
    for label in labels:
        own = [row for row in rows if row["label"] == label]
        cells = []
        for model in models:
            for text in texts:
                values = [row["eval"][text]["d"] for row in own if row["model"] == model]
                cells.append(_mean_and_spread(values))
        kl = " / ".join(_of_model(own, model, texts[0], "kl_mean", "{:.3f}") for model in models)
        top = " / ".join(_of_model(own, model, texts[0], "top1_agreement", "{:.1%}") for model in models)
        bits = statistics.mean(row["linear_bits_per_parameter"] for row in own)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {kl} | {top} | {bits:.2f} |")
    machine = ", ".join(f"{key} {value}" for key, value in runs["machine"].items())
    seeds = len({row["seed"] for row in rows})
    lines += [
        "",
        f"D in nats, mean of {seeds} calibration seeds ± half of highest minus lowest. KL and top-1 agreement on "
        f"{texts[0]}, {' / '.join(models)}. Calibration: {runs['protocol']['calibration']}. Evaluation: "
        f"{runs['protocol']['evaluation']}. Made by `{runs['command']}` on {machine}.",
    ]
    return "\n".join(lines) + "\n"


def _of_model(rows: list[dict[str, Any]], model: str, text: str, key: str, form: str) -> str:
    values = [row["eval"][text][key] for row in rows if row["model"] == model]
    return form.format(statistics.mean(values)) if values else "-"


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def goals(runs: dict[str, Any]) -> str:
    """What was aimed for before, and what was reached, on both reference models."""
    lines = ["| recipe | accept | target | stretch | `ref` | `ref_outlier` |", "|---|---|---|---|---|---|"]
    for label, levels in GOALS.items():
        shown = [" / ".join("-" if value is None else f"{value:.3f}" for value in level) for level in levels]
        cells = []
        for place, model in enumerate(("ref", "ref_outlier")):
            own = [row for row in runs["rows"] if row["label"] == label and row["model"] == model]
            reached = statistics.mean(row["eval"][GOAL_TEXT]["d"] for row in own)
            met = [
                name
                for name, level in zip(("accept", "target", "stretch"), levels)
                if (bound := level[place]) is not None and reached <= bound
            ]
            cells.append(f"{reached:.4f} ({met[-1] if met else 'missed'})")
        lines.append(f"| {label} | " + " | ".join([*shown, *cells]) + " |")
    return "\n".join(lines) + "\n"


def linear(runs: dict[str, Any]) -> str:
    """Times of one linear layer on a CPU."""
    lines = [
        "| tokens x width x outputs | int8 codes, ms | fake quantization | bf16 |",
        "|---|---|---|---|",
    ]
    for row in runs["rows"]:
        shape = f"{row['tokens']} x {row['width']} x {row['outputs']}"
        lines.append(
            f"| {shape} | {row['integer_ms']} | {row['fake_ms']} ({row['fake_over_integer']}x) | "
            f"{row['bf16_ms']} ({row['bf16_over_integer']}x) |"
        )
    where = f"{runs['threads']} threads, {runs['cpu_capability']}, torch {runs['torch']}, python {runs['python']}"
    return "\n".join([*lines, "", f"`python benchmarks/cpu.py linear`; {where}."]) + "\n"


def quantize(runs: dict[str, Any]) -> str:
    """Where quantizing spends its time."""
    total = runs["seconds"]
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in runs["seconds_by_step"].items() if value > 0.5)
    return (
        f"`{runs['recipe']}` on `{runs['model']}`: **{total:.0f} s**, peak memory **{runs['peak_rss_mb']} MB**, "
        f"linear layers {runs['linear_bits_per_parameter']:.2f} bits per parameter. Time: {parts}.\n"
    )


MAKERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": table,
    "goals": goals,
    "linear": linear,
    "quantize": quantize,
}


def rendered(document: str) -> str:
    """The document with all tables made anew."""

    def replace(match: re.Match[str]) -> str:
        runs = json.loads((RESULTS / match[3]).read_text())
        return match[1] + MAKERS[match[2]](runs) + match[4]

    return SECTION.sub(replace, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    before = DOCUMENT.read_text()
    after = rendered(before)
    if arguments.check:
        if before != after:
            sys.exit("docs/results.md and benchmarks/results/ disagree; run `python benchmarks/render.py`")
        return
    DOCUMENT.write_text(after)


if __name__ == "__main__":
    main()
