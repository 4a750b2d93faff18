"""Accuracy of the recipes and of each ingredient, on a trained model, with several calibration seeds.

    python benchmarks/accuracy.py --model MODEL --calibration TRAIN.txt --eval TEST.txt [--eval OTHER.txt]
        [--suite main|ablations|all|kv|family|weights] [--only LABEL ...] [--seeds 3] [--windows 24]
        [--device cuda] [--workers 4] [--work DIR] --out RESULTS.json

Suites of recipes for `mergequant.compare`, which runs them: 128 calibration windows of 512 tokens, and the first
windows of each evaluation text, with BOS, beside the float model. D is the increase of the mean negative log-likelihood
over the float model in nats. RESULTS.json gains a row per run; runs that are there already are skipped, and an
interrupted one goes on in the folder --work. A recipe that is not registered, or has no such setting, is left out, and
the reason is printed and kept. Cells of a model are spread over --workers processes, those of slow recipes first.
The suite `kv` scores each checkpoint with keys and values of 16, 8 and 4 bits: every token attends to what comes out of
the quantized cache, as while text is generated. Its rows go into a file of their own.
`benchmarks/render.py` makes the tables of docs/results.md from such files.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from suites import KV_BITS, SLOW, SUITES, Suite

import mergequant
from mergequant.cli.console import quiet_libraries
from mergequant.comparison.papers import paper_increase
from mergequant.errors import RecipeError
from mergequant.recipes import Recipe, get_recipe

SAMPLES, SEQLEN = 128, 512


class Lines:
    """A reporter that prints what is done, not every block."""

    def phase(self, text: str) -> None:
        """A phase, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        """Nothing."""

    def progress(self, text: str) -> None:
        """Nothing."""


def rows_of(report: mergequant.Comparison, suite: Suite) -> list[dict[str, Any]]:
    """Rows of the results from the cells of a comparison."""
    rows = []
    for cell in sorted(report.cells, key=lambda cell: (cell["recipe"], cell["seed"])):
        if cell["reason"]:
            print(f"{cell['model']:12} {cell['recipe']:40} refused: {cell['reason']}", flush=True)
            continue
        recipe, settings = suite[cell["recipe"]]
        row = {"model": cell["model"], "label": cell["recipe"], "recipe": recipe, "settings": settings}
        row |= {key: cell[key] for key in ("seed", "seconds", "kv_bits", "activation_bits", "peak_memory_bytes")}
        row["device"] = machine(report)["device"]
        row |= {key: round(cell[key], 4) for key in ("linear_bits_per_parameter", "bits_per_parameter")}
        row["sites"] = cell["site_figures"]
        row["eval"] = {
            name: {
                "d": found["nll_increase"],
                **{key: found[key] for key in ("perplexity", "float_perplexity", "kl_mean", "top1_agreement")},
            }
            for name, found in cell["texts"].items()
        }
        rows.append(row)
    return rows


def machine(report: mergequant.Comparison) -> dict[str, str]:
    """Where the runs were made."""
    name = f"CPU, {os.cpu_count()} cores" if report.machine["type"] == "cpu" else report.machine["name"]
    return {"device": name, **{key: value for key, value in report.machine["versions"].items() if value}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", required=True, action="append")
    parser.add_argument("--suite", choices=list(SUITES), default="main")
    parser.add_argument("--only", action="append", help="labels to run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="folder of checkpoints and cells")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    suite = SUITES[arguments.suite]
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    done = {(row["model"], row["label"], row["seed"], row.get("kv_bits", 16)) for row in known["rows"]}
    known["protocol"] = {
        "calibration": f"{SAMPLES} x {SEQLEN} tokens of {Path(arguments.calibration).name}",
        "evaluation": f"first {arguments.windows} windows of {SEQLEN} tokens with BOS of each text",
    }
    known["order"] = list(SUITES["all" if arguments.suite in ("main", "ablations") else arguments.suite])
    known["command"] = "python benchmarks/accuracy.py " + " ".join(
        f"--{key} {value if not isinstance(value, list) else ' '.join(map(str, value))}"
        for key, value in vars(arguments).items()
        if key in ("suite", "seeds", "windows", "device", "workers") and value is not None
    )
    recipes = available(suite, known)
    for path, bits in product(arguments.model, KV_BITS.get(arguments.suite, (16,))):
        model = Path(path).name
        for seeds, labels in missing(suite, arguments, model, bits, done, recipes).items():
            print(f"{model}: {len(labels)} recipes, seeds {', '.join(map(str, seeds))}", flush=True)
            report = mergequant.compare(
                path,
                {label: recipes[label] for label in labels},
                data=arguments.calibration,
                evaluation={Path(text).stem: text for text in arguments.eval},
                seeds=list(seeds),
                out=arguments.work / model,
                samples=SAMPLES,
                seqlen=SEQLEN,
                windows=arguments.windows,
                kv_bits=bits,
                device=arguments.device,
                workers=arguments.workers,
                reporter=Lines(),
            )
            known["machine"] = machine(report)
            known["rows"] += rows_of(report, suite)
            refused = known.setdefault("refused", {}).setdefault(model, {})
            for row in report.rows():
                refused.pop(row["recipe"], None)
                if row["reason"]:
                    refused[row["recipe"]] = row["reason"]
            write(arguments.out, known)
    write(arguments.out, known)


def available(suite: Suite, known: dict[str, Any]) -> dict[str, Recipe]:
    """Recipes of a suite that this release has, by label; the others are printed and noted, with the reason."""
    found, known["left_out"], known["expected"] = {}, {}, {}
    for label, (name, settings) in suite.items():
        try:
            found[label] = recipe = get_recipe(name).with_settings(settings)
        except RecipeError as error:
            known["left_out"][label] = str(error)
            print(f"left out: {label}: {error}", file=sys.stderr, flush=True)
            continue
        known["expected"][name] = [
            {**vars(figure), "nll_increase": paper_increase(figure)} for figure in recipe.expected
        ]
    return found


def missing(
    suite: Suite,
    arguments: argparse.Namespace,
    model: str,
    bits: int,
    done: set[tuple[str, str, int, int]],
    recipes: Mapping[str, Recipe],
) -> dict[tuple[int, ...], list[str]]:
    """Labels that are still to be run, by the seeds that they lack; slow recipes first."""
    wanted: dict[tuple[int, ...], list[str]] = {}
    for label in sorted(recipes, key=lambda label: suite[label][0] not in SLOW):
        seeds = tuple(seed for seed in range(arguments.seeds) if (model, label, seed, bits) not in done)
        if seeds and (not arguments.only or label in arguments.only):
            wanted.setdefault(seeds, []).append(label)
    return wanted


def write(path: Path, known: dict[str, Any]) -> None:
    """Write the results so that an interrupted write loses nothing."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(known, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
