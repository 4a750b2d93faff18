"""Run zero-shot tasks on several models and report accuracies with standard errors."""

import difflib
import importlib.util
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergequant.errors import DataError, UsageError
from mergequant.integrations.lm_eval.local import LOCAL_TASKS, Item, read_items

__all__ = ["require_lm_eval", "run_tasks"]


def require_lm_eval() -> None:
    """Raise `UsageError` with the command to install it when lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-eval, which is not installed; run `pip install mergequant[eval]`.")


def run_tasks(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Accuracy of each model on each task.

    tasks: names of `LOCAL_TASKS`, read from `<name>.jsonl` in the folder `task_data`; without `task_data`, and for all
        other names, lm-eval's own tasks, which it downloads. limit: items per task. seed: chooses few-shot examples of
        lm-eval's own tasks; local ones have none.

    Returns {task: {metric, samples, chance, bos, models: {name: {accuracy, standard_error, metrics}}}}. The groups of
    BLiMP are averaged, one vote per group, and their accuracies listed under `groups`.
    Raises `UsageError` for an unknown task or bad limit, `DataError` for a file that is missing or malformed or a
    download that fails.
    """
    require_lm_eval()
    if limit is not None and limit < 1:
        raise UsageError(f"--task-samples {limit}: must be at least 1.")
    local = [name for name in dict.fromkeys(tasks) if task_data is not None and name in LOCAL_TASKS]
    remote = [name for name in dict.fromkeys(tasks) if name not in local]
    # Read everything before anything is computed, so that the last of ten tasks cannot fail for a typo after an hour.
    items = {name: read_items(name, Path(task_data), limit) for name in local if task_data is not None}
    library = _library_tasks(remote, seed) if remote else {}

    from lm_eval import evaluator

    from mergequant.integrations.lm_eval.adapter import JsonlTask, MergeQuantLM

    results: dict[str, dict[str, Any]] = {}
    for model_name, model in models.items():
        adapter = MergeQuantLM(model, tokenizer, batch_size)
        for name in local:
            task = JsonlTask(name, items[name])
            output = evaluator.evaluate(adapter, {name: task}, bootstrap_iters=1, log_samples=True)
            head = results.setdefault(name, _describe(name, items[name], adapter.bos is not None))
            head["models"][model_name] = _local_result(name, output)
        if library:
            output = evaluator.evaluate(adapter, library, limit=limit, bootstrap_iters=100, log_samples=False)
            for name, figures in output["results"].items():
                count = output.get("n-samples", {}).get(name, {}).get("effective")
                head = {"samples": count, "chance": None, "bos": adapter.bos is not None, "models": {}}
                metric, result = _library_result(figures)
                head = results.setdefault(name, {"metric": metric, **head})
                head["models"][model_name] = result
    return results


def _describe(name: str, items: Sequence[Item], bos: bool) -> dict[str, Any]:
    chance = statistics.fmean(1 / item.candidates for item in items)
    return {
        "metric": LOCAL_TASKS[name].metric,
        "samples": len(items),
        "chance": None if chance == 1 else chance,
        "bos": bos,
        "models": {},
    }


def _local_result(name: str, output: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard error from the per-item results; several groups are averaged with equal weight."""
    metric = LOCAL_TASKS[name].metric
    groups: dict[str, list[float]] = defaultdict(list)
    for sample in output["samples"][name]:
        groups[sample["doc"]["group"]].append(float(sample[metric]))
    means = {group: statistics.fmean(values) for group, values in groups.items()}
    accuracy = statistics.fmean(means.values())
    # Bernoulli variance of each group's mean; groups are fixed, only their items are a sample.
    variance = sum(_variance_of_mean(values) for values in groups.values()) / len(groups) ** 2
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "standard_error": math.sqrt(variance),
        "metrics": _plain_metrics(output["results"][name]),
    }
    return result | ({"groups": means} if len(groups) > 1 else {})


def _variance_of_mean(values: Sequence[float]) -> float:
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.25


def _plain_metrics(figures: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's own figures, `acc,none` and the like, without the filter's name when there is none."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if isinstance(value, (int, float)) and "," in key
    }


def _library_result(figures: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    metrics = _plain_metrics(figures)
    names = [name for name in metrics if "_stderr" not in name]
    metric = next((name for name in ("acc", "exact_match", *names) if name in metrics), "none")
    base, _, rest = metric.partition(",")
    error = metrics.get(f"{base}_stderr{',' + rest if rest else ''}")
    return metric, {"accuracy": metrics.get(metric), "standard_error": error, "metrics": metrics}


def _library_tasks(names: Sequence[str], seed: int) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, sorted({*LOCAL_TASKS, *manager.all_tasks}), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; local ones: {', '.join(LOCAL_TASKS)}."
            raise UsageError(f"--tasks {name}: unknown task{hint}")
    try:
        found: dict[str, Any] = get_task_dict(list(names), manager)
    except Exception as error:  # downloads fail with the exceptions of a dozen libraries
        raise DataError(
            f"Tasks {', '.join(names)}: lm-eval could not load them ({type(error).__name__}: {error}); they are "
            f"downloaded from the network. Offline, give --task-data DIR with files of: {', '.join(LOCAL_TASKS)}."
        ) from error
    for task in found.values():
        if hasattr(task, "set_fewshot_seed"):
            task.set_fewshot_seed(seed)
    return found
