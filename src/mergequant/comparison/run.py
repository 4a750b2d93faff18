"""compare(): recipes x seeds on one model, each cell cached, and the table that they make.

    FOLDER/checkpoints/<recipe>-<fingerprint>-s<seed>/      checkpoints, with `.json` beside: what making them took
    FOLDER/cells/<recipe>-<fingerprint>-s<seed>-<texts>.json    one record per cell, whole or not there
    FOLDER/{table.md,table.csv,results.json,picture.png}    made anew after every cell, the picture at the end

A cell whose record is there is not run again; nor is a recipe quantized again whose checkpoint is there.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from mergequant.bench.machine import describe_device, versions
from mergequant.checkpoint.files import disk_errors
from mergequant.comparison.cell import Ground, Job, run_cell, run_float, stored_record
from mergequant.comparison.report import Comparison
from mergequant.comparison.workers import work_off
from mergequant.data import DataLike, DataSpec, Windows, as_data_spec, check_seqlen, head_windows
from mergequant.data.spec import PathSource, TextSource, TokenSource
from mergequant.errors import DataError, UsageError
from mergequant.eval import FLOAT_KV_BITS, KV_CHOICES, load_model, load_tokenizer
from mergequant.integrations.lm_eval import require_lm_eval
from mergequant.models import ModelShell
from mergequant.models.skeleton import local_folder
from mergequant.pipeline import Reporter, Silent, code_digest
from mergequant.recipes import Recipe
from mergequant.recipes.recipe import load_recipe
from mergequant.recipes.settings import parse_recipes

__all__ = ["compare"]

DEFAULT_SEQLEN = 512
WINDOWS = 24  # of each evaluation text
SHORT = 12  # digits of a fingerprint in a file's name
RecipesLike = str | Sequence[str | Recipe] | Mapping[str, str | Recipe]


def compare(
    model: str | Path,
    recipes: RecipesLike,
    *,
    evaluation: DataLike | Mapping[str, DataLike],
    data: DataLike = "self",
    tasks: Sequence[str] | str | None = None,
    task_data: str | Path | None = None,
    task_samples: int | None = None,
    seeds: int | Sequence[int] = 1,
    out: str | Path | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    windows: int | None = WINDOWS,
    bos: bool | None = None,
    kv_bits: int = FLOAT_KV_BITS,
    device: str = "cpu",
    workers: int = 1,
    reporter: Reporter | None = None,
) -> Comparison:
    """Quantize a model with each recipe and seed, measure all on the same windows, and lay them side by side.

    Args:
        model: a folder with a float transformers model.
        recipes: a list as `--recipes` takes it ("rtn,mergequant:split=0.05"), names or `Recipe`s, or these by label.
        evaluation: text to measure on; several by name. The first is the main one.
        data: calibration text, as for `quantize`.
        tasks, task_data, task_samples: zero-shot tasks, as for `evaluate`.
        seeds: how many calibration seeds (0, 1, ...), or which.
        out: folder of checkpoints, records and tables, where a later call goes on; None = a temporary one.
        samples, seqlen: calibration windows and their length in tokens (default 512, or the model's limit); windows to
            measure on have the same length.
        windows: how many of each text, from its start; None = all.
        bos: whether windows begin with BOS; None = if the tokenizer has one.
        kv_bits: 16, or 8 or 4 to measure through a quantized cache.
        device: what computes.
        workers: processes; more than one share the CPU's cores and, with device "cuda", all GPUs that are visible.
        reporter: shown the progress.

    A recipe that this model cannot serve becomes a row with the reason, and is not tried with further seeds.

    Raises:
        MergeQuantError: what concerns all recipes: a misspelt name, text that is missing, too short or also used for
            calibration, a model that cannot be read, a full disk. Cells that are done stay.
    """
    reporter = reporter or Silent()
    chosen = _recipes(recipes)
    numbers = _seeds(seeds)
    calibration = as_data_spec(data)
    texts = _texts(evaluation)
    names = _words(tasks)
    _check(calibration, texts, names, kv_bits, workers)
    folder = local_folder(model)
    reporter.phase("opening the model")
    shell = ModelShell.open(folder)
    seqlen = min(DEFAULT_SEQLEN, shell.max_positions or DEFAULT_SEQLEN) if seqlen is None else seqlen
    check_seqlen(seqlen, shell.max_positions)
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory(prefix="mergequant-")) if out is None else out)
        with disk_errors(place):
            for part in ("checkpoints", "cells"):
                (place / part).mkdir(parents=True, exist_ok=True)
        reporter.phase("reading the evaluation text")
        drawn = _draw(texts, folder, windows, seqlen, bos, device)
        ground = Ground(
            folder, calibration, samples, seqlen, bos, drawn, names,
            None if task_data is None else Path(task_data), task_samples, kv_bits, device,
        )  # fmt: skip
        source = shell.source.fingerprint()
        jobs = [
            _job(ground, place, source, label, recipe, seed) for seed in numbers for label, recipe in chosen.items()
        ]
        report = Comparison(folder.resolve().name, chosen, list(drawn), _protocol(ground, numbers), _machine(device))
        path = place / "cells" / f"float-{_short(source, _measured(ground))}.json"
        reporter.phase("measuring the float model")
        report.float_ = stored_record(path) or run_float(ground, path)
        for record in _run(jobs, workers, reporter):
            report.add(record)
            report.write(place)
        report.draw(place)
        if out is not None:
            report.folder = place
        return report


def _run(jobs: Sequence[Job], workers: int, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """Records of all cells: first those that are there, then the others as they come."""
    pending = []
    for job in jobs:
        stored = stored_record(job.record)
        if stored is None:
            pending.append(job)
        else:
            yield stored
    records = _one_by_one(pending, reporter) if workers == 1 or len(pending) < 2 else _side_by_side(pending, workers)
    refused: set[str] = set()
    for number, record in enumerate(records, 1):
        reporter.phase(f"{record['recipe']}, seed {record['seed']}: {_outcome(record)} ({number} of {len(pending)})")
        if record["reason"]:
            if record["recipe"] in refused:
                continue
            refused.add(record["recipe"])
        yield record


def _outcome(record: Mapping[str, Any]) -> str:
    return "refused" if record["reason"] else f"D {next(iter(record['texts'].values()))['nll_increase']:+.4f}"


def _one_by_one(jobs: Sequence[Job], reporter: Reporter) -> Iterator[dict[str, Any]]:
    refused: set[str] = set()
    for job in jobs:
        if job.label in refused:
            continue
        reporter.phase(f"{job.label}, seed {job.seed}: quantizing")
        record = run_cell(job, reporter)
        if record["reason"]:
            refused.add(job.label)
        yield record


def _side_by_side(jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Any]]:
    """In processes of their own. All seeds of the first recipe come first: who names slow recipes first waits less."""
    groups: dict[Path, list[Job]] = {}
    labels = list(dict.fromkeys(job.label for job in jobs))
    for job in sorted(jobs, key=lambda job: labels.index(job.label)):
        groups.setdefault(job.checkpoint, []).append(job)  # two labels may mean one recipe; one writer per checkpoint
    return work_off(list(groups.values()), workers, run_cell, _lost, _gpus(jobs[0].ground.device))


def _gpus(device: str) -> list[dict[str, str]]:
    """Variables that show a process one of the visible GPUs; none if the device is no GPU, or one by its number."""
    if device != "cuda":
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return [{"CUDA_VISIBLE_DEVICES": name} for name in (named[:count] or map(str, range(count)))]


def _lost(job: Job, how: str) -> dict[str, Any]:
    why = f"its process {how}, as happens when memory runs out; fewer --workers or --samples need less"
    return {**job.head, "reason": why}


def _job(ground: Ground, place: Path, source: str, label: str, recipe: Recipe, seed: int) -> Job:
    """A cell with its places. The same name means the same result."""
    parts = {
        "model": source,
        "recipe": recipe.to_dict(),
        "data": _digest(ground.data),
        "windows": [ground.samples, ground.seqlen, ground.bos],
        "device": ground.device.partition(":")[0],
        "code": code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    plain = re.sub(r"[^\w.-]+", "_", recipe.name)[:60]
    name = f"{plain}-{_short(json.dumps(parts, sort_keys=True))}-s{seed}"
    record = place / "cells" / f"{name}-{_short(label, _measured(ground))}.json"
    return Job(ground, label, recipe, seed, place / "checkpoints" / name, record)


def _measured(ground: Ground) -> str:
    """All that decides what a measurement gives, but for the model."""
    texts = [[name, windows.fingerprint] for name, windows in ground.texts.items()]
    tasks = [ground.tasks, str(ground.task_data), ground.task_samples]
    return json.dumps([texts, tasks, ground.kv_bits, ground.device.partition(":")[0], code_digest()])


def _digest(spec: DataSpec) -> str:
    """sha256 over what calibration text says it is, and over what it holds where that lies on this machine."""
    digest = hashlib.sha256(str(spec).encode())
    for part in spec.parts:
        source = part.source
        if isinstance(source, PathSource):
            found = sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]
            for path in (path for path in found if path.is_file()):
                digest.update(path.read_bytes())
        elif isinstance(source, TextSource):
            digest.update(json.dumps(source.texts).encode())
        elif isinstance(source, TokenSource):
            digest.update(source.tokens.numpy().tobytes())
    return digest.hexdigest()


def _short(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:SHORT]


def _recipes(given: RecipesLike) -> dict[str, Recipe]:
    """Recipes by label."""
    if isinstance(given, str):
        return parse_recipes(given)
    if isinstance(given, Mapping):
        found = {label: load_recipe(item) if isinstance(item, str) else item for label, item in given.items()}
    else:
        found = {}
        for item in given:
            new = parse_recipes(item) if isinstance(item, str) else {item.name: item}
            if twice := sorted(set(new) & set(found)):
                raise UsageError(f"recipes: {twice[0]} is given twice; pass a mapping of labels to recipes")
            found |= new
    if not found:
        raise UsageError("recipes: none given; name some that `mergequant recipes` lists")
    return found


def _seeds(given: int | Sequence[int]) -> list[int]:
    numbers = list(range(given)) if isinstance(given, int) else list(dict.fromkeys(given))
    if not numbers or min(numbers) < 0:
        raise UsageError(f"--seeds {given}: give a positive number of seeds, or a list of seeds from 0")
    return numbers


def _texts(given: DataLike | Mapping[str, DataLike]) -> dict[str, DataSpec]:
    """Evaluation texts by name."""
    if isinstance(given, Mapping):
        found = {name: as_data_spec(item) for name, item in given.items()}
        if not found:
            raise UsageError("evaluation: no text given; name a .txt file or folder, hf:NAME, or self")
        return found
    spec = as_data_spec(given)
    return {text_name(spec): spec}


def text_name(spec: DataSpec) -> str:
    """A file's name without suffix, else the source in words."""
    source = spec.parts[0].source
    return source.path.stem if len(spec.parts) == 1 and isinstance(source, PathSource) else str(spec)


def _words(tasks: Sequence[str] | str | None) -> tuple[str, ...]:
    entries = [tasks] if isinstance(tasks, str) else list(tasks or ())
    return tuple(name.strip() for entry in entries for name in entry.split(",") if name.strip())


def _check(
    calibration: DataSpec, texts: Mapping[str, DataSpec], tasks: Sequence[str], kv_bits: int, workers: int
) -> None:
    """Refuse, before anything is read, what no recipe could make good."""
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least one process is needed")
    if kv_bits not in KV_CHOICES:
        raise UsageError(f"--kv {kv_bits}: choose one of {', '.join(map(str, KV_CHOICES))}")
    if tasks:
        if kv_bits != FLOAT_KV_BITS:
            raise UsageError(f"--tasks are run without a quantized cache; leave out --kv {kv_bits}")
        require_lm_eval()
    known = {part.source.path.resolve() for part in calibration.parts if isinstance(part.source, PathSource)}
    for name, spec in texts.items():
        for part in spec.parts:
            if isinstance(part.source, PathSource) and part.source.path.resolve() in known:
                raise UsageError(f"{name} is both calibration and evaluation text; evaluate on another one")


def _draw(
    texts: Mapping[str, DataSpec], folder: Path, count: int | None, seqlen: int, bos: bool | None, device: str
) -> dict[str, Windows]:
    """The windows that all recipes are measured on."""
    tokenizer = load_tokenizer(folder)
    sampler = load_model(folder, device) if any(spec.needs_model for spec in texts.values()) else None
    start: Any = "auto" if bos is None else bos
    drawn = {}
    for name, spec in texts.items():
        drawn[name] = head_windows(spec, tokenizer, samples=count, seqlen=seqlen, bos=start, model=sampler)
        if not len(drawn[name]):
            raise DataError(f"{name}: shorter than one window of {seqlen} tokens; give more text or a smaller --seqlen")
    return drawn


def _protocol(ground: Ground, seeds: Sequence[int]) -> dict[str, Any]:
    """How the figures came about."""
    return {
        "calibration": {"data": str(ground.data), "samples": ground.samples, "seqlen": ground.seqlen},
        "evaluation": {
            name: {
                "data": windows.source,
                "samples": len(windows),
                "seqlen": windows.seqlen,
                "bos": windows.begins_with_bos,
                "fingerprint": windows.fingerprint,
            }
            for name, windows in ground.texts.items()
        },
        "seeds": list(seeds),
        "kv_bits": ground.kv_bits,
        "dtype": "float32",
    }


def _machine(device: str) -> dict[str, Any]:
    place = torch.device(device)
    return {**describe_device(place), "versions": versions(place)}
