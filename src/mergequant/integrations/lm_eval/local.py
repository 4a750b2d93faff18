"""Zero-shot tasks on local `.jsonl` files: what each file holds, and the question that a model is asked.

Prompts are those that lm-eval uses for the data sets of the same name, so that accuracies compare with published ones;
only where the records come from differs (and COPA's answers follow one space, not two). Nothing here needs lm-eval.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergequant.errors import DataError, UsageError

__all__ = ["LOCAL_TASKS", "Item", "LocalTask", "find_file", "read_items"]


@dataclass(frozen=True)
class Item:
    """One question.

    contexts, continuations: the candidates are all pairs, joined by a space; one of the two has length 1.
    gold: index of the right candidate. group: sub-task; the accuracies of groups are averaged.
    A single candidate asks whether it is the greedy continuation; it is joined as it is.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0
    group: str = ""

    @property
    def candidates(self) -> int:
        """Number of answers to choose from; 1 for a completion task."""
        return len(self.contexts) * len(self.continuations)


@dataclass(frozen=True)
class LocalTask:
    """A task: the file names it may be found under, its metric, and how a record becomes an item."""

    files: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Item]
    metric: str = "acc"


def _choice(context: str, answers: list[str], gold: int) -> Item:
    return Item((context,), tuple(answers), gold)


def _question(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _lettered(context: str, record: Mapping[str, Any]) -> Item:
    labels = record["choices"]["label"]
    return _choice(context, record["choices"]["text"], labels.index(record["answerKey"].strip()))


def _lambada(record: Mapping[str, Any]) -> Item:
    return Item((record["context"],), (f" {record['continuation'].strip()}",))


def _sciq(record: Mapping[str, Any]) -> Item:
    answers = [record[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _choice(f"{record['support'].lstrip()}\n{_question(record['question'])}", answers, 3)


def _winogrande(record: Mapping[str, Any]) -> Item:
    # Both readings are completed by the same words, so the contexts are compared (partial evaluation).
    before, _, after = record["sentence"].partition("_")
    return Item((before + record["option1"], before + record["option2"]), (after.strip(),), int(record["answer"]) - 1)


def _copa(record: Mapping[str, Any]) -> Item:
    link = {"cause": "because", "effect": "therefore"}[record["question"]]
    answers = [record[key][:1].lower() + record[key][1:] for key in ("choice1", "choice2")]
    return _choice(f"{record['premise'].strip()[:-1]} {link}", answers, record["label"])


LOCAL_TASKS: dict[str, LocalTask] = {
    "arc_challenge": LocalTask(("arc_challenge",), lambda r: _lettered(_question(r["question"]), r), "acc_norm"),
    "arc_easy": LocalTask(("arc_easy",), lambda r: _lettered(_question(r["question"]), r)),
    "blimp": LocalTask(("blimp",), lambda r: Item(("",), (r["sentence_good"], r["sentence_bad"]), 0, group=r["UID"])),
    "boolq": LocalTask(
        ("boolq",),
        lambda r: _choice(f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ["no", "yes"], int(r["answer"])),
    ),
    "copa": LocalTask(("copa",), _copa),
    "hellaswag": LocalTask(
        ("hellaswag", "hellaswag_val"), lambda r: _choice(r["ctx"], r["endings"], int(r["label"])), "acc_norm"
    ),
    "lambada_openai": LocalTask(("lambada_openai",), _lambada),
    "openbookqa": LocalTask(("openbookqa",), lambda r: _lettered(r["question_stem"], r), "acc_norm"),
    "piqa": LocalTask(
        ("piqa", "piqa_val"), lambda r: _choice(_question(r["goal"]), [r["sol1"], r["sol2"]], int(r["label"]))
    ),
    "sciq": LocalTask(("sciq",), _sciq),
    "winogrande": LocalTask(("winogrande", "winogrande_val"), _winogrande),
}
"""Local tasks by lm-eval's name for them."""


def find_file(name: str, folder: Path) -> Path:
    """The file of a local task. Raises `UsageError` for a folder that is none and `DataError` for a missing file."""
    if not folder.is_dir():
        raise UsageError(f"--task-data {str(folder)!r}: no such folder.")
    stems = LOCAL_TASKS[name].files
    for stem in stems:
        if (file := folder / f"{stem}.jsonl").is_file():
            return file
    present = ", ".join(sorted(file.name for file in folder.glob("*.jsonl"))) or "none"
    wanted = " or ".join(f"{stem}.jsonl" for stem in stems)
    raise DataError(f"Task {name!r}: {wanted} not found in {str(folder)!r} (files there: {present}).")


def read_items(name: str, folder: Path, limit: int | None = None) -> list[Item]:
    """Items of a local task in file order, at most `limit`, spread evenly over its groups.

    Raises `DataError` naming file and line for a record that is not of this task, or if there is none.
    """
    file, task = find_file(name, folder), LOCAL_TASKS[name]
    groups: dict[str, list[Item]] = defaultdict(list)
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    item = task.convert(json.loads(line))
                except (KeyError, ValueError, TypeError, AttributeError) as error:
                    raise DataError(
                        f"Task {name!r}: {str(file)!r} line {number} is not a record of this task "
                        f"({type(error).__name__}: {error})."
                    ) from error
                groups[item.group].append(item)
    except UnicodeDecodeError as error:
        raise DataError(f"Task {name!r}: {str(file)!r} is not UTF-8 ({error.reason}).") from error
    if not groups:
        raise DataError(f"Task {name!r}: {str(file)!r} holds no record.")
    if limit is None:
        return [item for items in groups.values() for item in items]
    share, more = divmod(limit, len(groups))
    return [item for i, items in enumerate(groups.values()) for item in items[: share + (i < more)]]
