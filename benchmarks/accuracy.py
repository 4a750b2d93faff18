"""Accuracy of the recipes and of each ingredient, on a trained model, with several calibration seeds.

    python benchmarks/accuracy.py --model MODEL --calibration TRAIN.txt --eval TEST.txt [--eval OTHER.txt]
        [--suite main|ablations|all|kv] [--only LABEL ...] [--seeds 3] [--windows 24] [--device cuda] [--workers 4]
        --out RESULTS.json

Every run quantizes with 128 windows of 512 tokens, writes and verifies a checkpoint, loads it from disk and scores it
on the first windows of each evaluation text, with BOS, beside the float model. D is the increase of the mean negative
log-likelihood over the float model in nats. RESULTS.json gains a row per run; runs that are there already are skipped.
The suite `kv` scores each checkpoint with keys and values of 16, 8 and 4 bits: every token attends to what comes out of
the quantized cache, as while text is generated. Its rows go into a file of their own.
`benchmarks/render.py` makes the tables of docs/results.md from such files.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mergequant
from mergequant.data import head_windows
from mergequant.eval.perplexity import score
from mergequant.integrations.transformers import QuantizedCache

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


def run_one(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Quantize, reload, score. Returns a row of the results for each width of keys and values."""
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    row = {key: job[key] for key in ("model", "label", "recipe", "settings", "seed")}
    with tempfile.TemporaryDirectory() as folder:
        done = mergequant.quantize(
            job["path"],
            job["recipe"],
            data=job["calibration"],
            out=Path(folder) / "q",
            samples=SAMPLES,
            seqlen=SEQLEN,
            seed=job["seed"],
            settings=job["settings"],
            device=job["device"],
        )
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["linear_bits_per_parameter"] = round(done.figures["linear_bits_per_parameter"], 4)
        row["bits_per_parameter"] = round(done.figures["bits_per_parameter"], 4)
        quantized = mergequant.load(done.folder, dtype=torch.float32, device=job["device"])
    floating = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32).to(job["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["path"])
    rows = []
    for bits in job["kv_bits"]:
        row = {**row, "kv_bits": bits, "eval": {}}
        for text in job["eval"]:
            windows = head_windows(text, tokenizer, samples=job["windows"], seqlen=SEQLEN)
            scores = score(quantized, windows, against=floating, new_cache=None if bits == 16 else partial(cache, bits))
            if scores.against is None or scores.divergence is None:
                raise RuntimeError("the float model was not scored")
            row["eval"][Path(text).stem] = {
                "d": scores.divergence.nll_increase,
                "perplexity": scores.model.perplexity,
                "float_perplexity": scores.against.perplexity,
                "kl_mean": scores.divergence.kl_mean,
                "top1_agreement": scores.divergence.top1_agreement,
            }
        rows.append(row)
    return rows


def cache(bits: int, model: PreTrainedModel) -> QuantizedCache:
    """A quantized cache for a model."""
    return QuantizedCache.for_model(model, bits)


def machine(device: str) -> dict[str, str]:
    """Where the runs were made."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mergequant": mergequant.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return found


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
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    done = {(row["model"], row["label"], row["seed"]) for row in known["rows"]}
    known["protocol"] = {
        "calibration": f"{SAMPLES} x {SEQLEN} tokens of {Path(arguments.calibration).name}",
        "evaluation": f"first {arguments.windows} windows of {SEQLEN} tokens with BOS of each text",
    }
    known["machine"] = machine(arguments.device)
    known["order"] = list(SUITES["kv" if arguments.suite == "kv" else "all"])
    known["command"] = "python benchmarks/accuracy.py " + " ".join(
        f"--{key} {value if not isinstance(value, list) else ' '.join(map(str, value))}"
        for key, value in vars(arguments).items()
        if key in ("suite", "seeds", "windows", "device", "workers") and value is not None
    )
    jobs = [
        {
            "model": Path(path).name,
            "path": path,
            "label": label,
            "recipe": recipe,
            "settings": settings,
            "seed": seed,
            "calibration": arguments.calibration,
            "eval": arguments.eval,
            "windows": arguments.windows,
            "device": arguments.device,
            "threads": max((os.cpu_count() or 1) // arguments.workers, 1),
            "kv_bits": KV_BITS.get(arguments.suite, (16,)),
        }
        for seed in range(arguments.seeds)
        for path in arguments.model
        for label, (recipe, settings) in SUITES[arguments.suite].items()
        if (Path(path).name, label, seed) not in done and (not arguments.only or label in arguments.only)
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        for row in chain.from_iterable(pool.imap_unordered(run_one, jobs)):
            known["rows"].append(row)
            arguments.out.write_text(json.dumps(known, indent=1) + "\n")
            shown = "  ".join(f"{name} {value['d']:+.4f}" for name, value in row["eval"].items())
            what = f"{row['model']:12} {row['label']:40} kv{row['kv_bits']:<2} seed {row['seed']}"
            print(f"{what}  {shown}  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
