"""One cell of a comparison: a recipe with a seed is quantized, loaded from disk, and measured beside the float model.

A cell is a pure function of its job, so that it runs as well in a process of its own. Its record is the only thing that
it hands on, JSON-ready, and is on disk before it is handed on.
"""

import math
import statistics
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergequant.checkpoint import open_checkpoint
from mergequant.checkpoint.files import read_json, write_bytes, write_json
from mergequant.comparison.memory import peak_memory
from mergequant.data import DataSpec, Windows
from mergequant.errors import (
    CheckpointError,
    InputError,
    KernelError,
    MergeQuantError,
    NumericsError,
    StructureError,
    UsageError,
    VerifyError,
)
from mergequant.eval import FLOAT_KV_BITS, evaluate, load_model, load_tokenizer
from mergequant.integrations.lm_eval import run_tasks
from mergequant.nn import LinearSpec
from mergequant.pipeline import Reporter, quantize
from mergequant.recipes import Recipe

__all__ = ["Ground", "Job", "activation_bits", "run_cell", "run_float", "stored_record"]

FLOAT_BITS = 16
# What says that this recipe does not work on this model. Anything else (no text, a full disk) stops the comparison.
REFUSALS = (UsageError, StructureError, NumericsError, KernelError, InputError, VerifyError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Ground:
    """What all cells of a comparison share.

    Attributes:
        model: folder of the float model.
        data, samples, seqlen, bos: of the calibration.
        texts: windows to measure on, by name; the first is the main one.
        tasks, task_data, task_samples: zero-shot tasks.
        kv_bits: width of keys and values while measuring.
        device: what computes.
    """

    model: Path
    data: DataSpec
    samples: int
    seqlen: int
    bos: bool | None
    texts: Mapping[str, Windows]
    tasks: tuple[str, ...]
    task_data: Path | None
    task_samples: int | None
    kv_bits: int
    device: str


@dataclass(frozen=True)
class Job:
    """A cell that is to be run.

    Attributes:
        label: what the recipe is called in the table.
        checkpoint: folder of the checkpoint; it may be there already. `made`: the record of how it was made.
        record: file of the cell's record.
    """

    ground: Ground
    label: str
    recipe: Recipe
    seed: int
    checkpoint: Path
    record: Path

    @property
    def made(self) -> Path:
        """Beside the checkpoint: time and memory that it took."""
        return self.checkpoint.with_name(f"{self.checkpoint.name}.json")

    @property
    def head(self) -> dict[str, Any]:
        """What every record of this cell begins with."""
        return {
            "recipe": self.label,
            "name": self.recipe.name,
            "model": self.ground.model.resolve().name,
            "seed": self.seed,
            "kv_bits": self.ground.kv_bits,
        }


def run_cell(job: Job, reporter: Reporter | None = None) -> dict[str, Any]:
    """Quantize unless that is done, measure, write the record.

    A recipe that cannot serve gives its reason. So does one that ends in a fault of mergequant or a library, which
    costs the other recipes nothing; its traceback is written beside the record.
    """
    traces = job.record.with_suffix(".traceback.txt")
    try:
        made = _checkpoint(job, reporter)
        if reporter is not None:
            reporter.phase(f"{job.label}, seed {job.seed}: measuring")
        record = {**job.head, "reason": None, **made, **_measure(job.ground, job.checkpoint)}
    except REFUSALS as error:
        record = {**job.head, "reason": " ".join(str(error).split())}
    except (MergeQuantError, OSError):
        raise
    except Exception as error:
        write_bytes(traces, traceback.format_exc().encode())
        words = " ".join(f"{type(error).__name__}: {error}".split())
        record = {**job.head, "reason": f"a fault of mergequant or of a library, please report it: {words} ({traces})"}
    else:
        traces.unlink(missing_ok=True)
    write_json(job.record, record)
    return record


def run_float(ground: Ground, path: Path) -> dict[str, Any]:
    """The float model on the same texts and tasks; the record is written to `path`."""
    model = load_model(ground.model, ground.device)
    tokenizer = load_tokenizer(ground.model)
    texts, size = {}, {}
    for name, windows in ground.texts.items():
        found = evaluate(model, data=windows.tokens, seqlen=windows.seqlen, tokenizer=tokenizer).float_
        if found is None:
            raise UsageError(f"{ground.model} is already quantized; compare recipes on the float model")
        texts[name] = {"perplexity": _finite(found.likelihood.perplexity), "nll": found.likelihood.nll}
        size = {
            "bits_per_parameter": found.size.bits_per_parameter,
            "linear_bits_per_parameter": found.size.linear_bits_per_parameter,
        }
    record = {"texts": texts, **size, "tasks": _tasks(ground, model, tokenizer)}
    write_json(path, record)
    return record


def stored_record(path: Path) -> dict[str, Any] | None:
    """A record that was written whole, None if there is none or it holds a reason, which is to be tried again."""
    try:
        record = read_json(path)
    except CheckpointError:
        return None
    return record if isinstance(record, dict) and record.get("reason") is None else None


def activation_bits(folder: Path) -> float:
    """Mean width in bits of what the linear layers of a checkpoint multiply, by parameters; 16 stands for float."""
    layers = open_checkpoint(folder).quantization.layers.values()
    linears = [(spec.outputs * spec.input.in_width, spec.input) for spec in layers if isinstance(spec, LinearSpec)]
    total = sum(weight * (FLOAT_BITS if given.kind == "float" else given.bits) for weight, given in linears)
    return total / max(sum(weight for weight, _ in linears), 1)


def _checkpoint(job: Job, reporter: Reporter | None) -> dict[str, Any]:
    """Make the checkpoint, or take the one of the same fingerprint that is there; what it took and what it takes."""
    stored = stored_record(job.made) if (job.checkpoint / "config.json").is_file() else None
    if stored is not None:
        return stored
    ground, started = job.ground, time.perf_counter()
    with peak_memory(torch.device(ground.device)) as peak:
        done = quantize(
            ground.model,
            job.recipe,
            data=ground.data,
            out=job.checkpoint,
            samples=ground.samples,
            seqlen=ground.seqlen,
            seed=job.seed,
            device=ground.device,
            bos=ground.bos,
            reporter=reporter,
        )
    made = {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": peak.bytes,
        "bits_per_parameter": done.figures["bits_per_parameter"],
        "linear_bits_per_parameter": done.figures["linear_bits_per_parameter"],
        "activation_bits": activation_bits(job.checkpoint),
        "site_figures": _over_sites(done.figures["sites"]),
    }
    write_json(job.made, made)
    return made


def _over_sites(blocks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Every figure that steps report of their sites, such as the relative error at the output: its mean."""
    found: dict[str, list[float]] = {}
    for sites in blocks.values():
        for figures in sites.values():
            for name, value in figures.items():
                found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _measure(ground: Ground, checkpoint: Path) -> dict[str, Any]:
    # Both models are loaded for the cell alone, so that neither counts in the peak memory of the next quantization.
    quantized = load_model(checkpoint, ground.device, torch.float32)
    exact = load_model(ground.model, ground.device)
    tokenizer = load_tokenizer(ground.model)
    texts = {}
    for name, windows in ground.texts.items():
        report = evaluate(
            quantized,
            exact,
            data=windows.tokens,
            seqlen=windows.seqlen,
            tokenizer=tokenizer,
            kv_bits=ground.kv_bits,
        ).to_dict()
        texts[name] = {
            "nll_increase": report["nll_increase"],
            "nll_increase_standard_error": report["nll_increase_standard_error"],
            "perplexity": _finite(report["quantized"]["perplexity"]),
            "float_perplexity": _finite(report["float"]["perplexity"]),
            "kl_mean": report["kl_mean"],
            "kl_p99": report["kl_p99"],
            "top1_agreement": report["top1_agreement"],
        }
    return {"texts": texts, "tasks": _tasks(ground, quantized, tokenizer)}


def _tasks(ground: Ground, model: Any, tokenizer: Any) -> dict[str, Any]:
    if not ground.tasks or ground.kv_bits != FLOAT_KV_BITS:
        return {}
    options = {"task_data": ground.task_data, "limit": ground.task_samples}
    found = run_tasks({"it": model}, tokenizer, ground.tasks, **options)  # type: ignore[arg-type]
    return {
        name: {
            **{key: result[key] for key in ("metric", "samples", "chance")},
            **{key: result["models"]["it"][key] for key in ("accuracy", "standard_error")},
        }
        for name, result in found.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
