"""Tables of docs/results.md from the runs under benchmarks/results/.

    python benchmarks/render.py            # rewrite the tables in docs/results.md
    python benchmarks/render.py --check    # exit 1 if the document and the runs disagree

The document holds a pair of markers for each file, `<!-- accuracy:FILE -->` and `<!-- end -->`; what stands between
them is made here and is not edited by hand.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- accuracy:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def rendered(document: str) -> str:
    """The document with all tables made anew."""

    def replace(match: re.Match[str]) -> str:
        runs = json.loads((RESULTS / match[2]).read_text())
        return match[1] + table(runs) + match[3]

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
