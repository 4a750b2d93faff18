"""Accuracy of the recipes and of each ingredient, on a trained model, with several calibration seeds.

    python benchmarks/accuracy.py --model MODEL --calibration TRAIN.txt --eval TEST.txt [--eval OTHER.txt]
        [--suite main|ablations|all|kv] [--only LABEL ...] [--seeds 3] [--windows 24] [--device cuda] [--workers 4]
        [--work DIR] --out RESULTS.json

Suites of recipes for `mergequant.compare`, which runs them: 128 calibration windows of 512 tokens, and the first
windows of each evaluation text, with BOS, beside the float model. D is the increase of the mean negative log-likelihood
over the float model in nats. RESULTS.json gains a row per run; runs that are there already are skipped, and an
interrupted one goes on in the folder --work.
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

import mergequant
from mergequant.recipes import get_recipe

PLUS = "mergequant-plus"
MAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq W4A16": ("gptq", {}),
    "gptq W4A4 per token": ("gptq", {"activation_bits": 4}),
    "rtn W4A4 per token": ("rtn", {}),
    "mergequant": ("mergequant", {}),
    "mergequant-plus": (PLUS, {}),
    "mergequant-plus, o/d int8 by QSM": (PLUS, {"other": "static", "other_bits": 8}),
    "mergequant-w4a8": ("mergequant-w4a8", {}),
}
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mergequant: 5 % split everywhere": ("mergequant", {"split": 0.05}),
    "mergequant: no split": ("mergequant", {"split": 0.0}),
    "mergequant: no clip": ("mergequant", {"clip": "none"}),
    "mergequant: no compensation": ("mergequant", {"compensation": "none"}),
    "mergequant: low-rank compensation": ("mergequant", {"compensation": "low_rank"}),
    "mergequant: RTN instead of GPTQ": ("mergequant", {"rounding": "rtn"}),
    "plus: no split": (PLUS, {"split": 0.0}),
    "plus: no clip": (PLUS, {"clip": "none"}),
    "plus: no stagger": (PLUS, {"stagger": False}),
    "plus: RTN instead of GPTQ": (PLUS, {"rounding": "rtn"}),
    "plus: prune instead of pad": (PLUS, {"width": "prune"}),
    "plus: no prefix": (PLUS, {"prefix": "none", "allow_no_prefix": True}),
    "plus: no compensation": (PLUS, {"compensation": "none"}),
    "plus: low-rank compensation": (PLUS, {"compensation": "low_rank"}),
    "plus: pad 128": (PLUS, {"tile": 128}),
    "plus: o/d Hadamard with token scales, no prefix": (PLUS, {"other": "hadamard", "prefix": "none"}),
    "plus: o/d int4 by QSM": (PLUS, {"other": "static"}),
    "w4a8: no split": ("mergequant-w4a8", {"split": 0.0}),
    "w4a8: no prefix": ("mergequant-w4a8", {"prefix": "none", "allow_no_prefix": True}),
    "w4a8: o/d by QSM, no Hadamard": ("mergequant-w4a8", {"other": "static"}),
}
KV: dict[str, tuple[str, dict[str, Any]]] = {"mergequant-w4a8": MAIN["mergequant-w4a8"], PLUS: MAIN[PLUS]}
SUITES = {"main": MAIN, "ablations": ABLATIONS, "all": {**MAIN, **ABLATIONS}, "kv": KV}
KV_BITS = {"kv": (16, 8, 4)}  # of other suites: 16 only
SAMPLES, SEQLEN = 128, 512


class Lines:
    """A reporter that prints what is done, not every block."""

    def phase(self, text: str) -> None:
        """A phase, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        """Nothing."""


def rows_of(report: mergequant.Comparison, suite: dict[str, tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the results from the cells of a comparison."""
    rows = []
    for cell in report.cells:
        if cell["reason"]:
            print(f"{cell['model']:12} {cell['recipe']:40} refused: {cell['reason']}", flush=True)
            continue
        recipe, settings = suite[cell["recipe"]]
        row = {"model": cell["model"], "label": cell["recipe"], "recipe": recipe, "settings": settings}
        row |= {key: cell[key] for key in ("seed", "seconds", "kv_bits")}
        row |= {key: round(cell[key], 4) for key in ("linear_bits_per_parameter", "bits_per_parameter")}
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
    suite = SUITES[arguments.suite]
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    done = {(row["model"], row["label"], row["seed"], row.get("kv_bits", 16)) for row in known["rows"]}
    known["protocol"] = {
        "calibration": f"{SAMPLES} x {SEQLEN} tokens of {Path(arguments.calibration).name}",
        "evaluation": f"first {arguments.windows} windows of {SEQLEN} tokens with BOS of each text",
    }
    known["order"] = list(SUITES["kv" if arguments.suite == "kv" else "all"])
    known["command"] = "python benchmarks/accuracy.py " + " ".join(
        f"--{key} {value if not isinstance(value, list) else ' '.join(map(str, value))}"
        for key, value in vars(arguments).items()
        if key in ("suite", "seeds", "windows", "device", "workers") and value is not None
    )
    for seed, path, bits in product(range(arguments.seeds), arguments.model, KV_BITS.get(arguments.suite, (16,))):
        recipes = {
            label: get_recipe(recipe).with_settings(settings)
            for label, (recipe, settings) in suite.items()
            if (Path(path).name, label, seed, bits) not in done and (not arguments.only or label in arguments.only)
        }
        if not recipes:
            continue
        report = mergequant.compare(
            path,
            recipes,
            data=arguments.calibration,
            evaluation={Path(text).stem: text for text in arguments.eval},
            seeds=[seed],
            out=arguments.work,
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
        arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
