"""What a comparison found: one row per recipe over its seeds, as JSON, Markdown, CSV, terminal table and picture.

D is the increase of the mean negative log-likelihood over the float model, in nats per token; figures are means over
seeds, a spread is the highest minus the lowest.
"""

import csv
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mergequant.checkpoint.files import write_bytes
from mergequant.comparison.papers import PAPER_COLUMNS, PAPERS, paper_increase, paper_lines
from mergequant.comparison.picture import NO_PICTURE, Point, picture
from mergequant.eval import human_bytes
from mergequant.recipes import Recipe

__all__ = ["Comparison"]

TABLE, SHEET, RESULTS, PICTURE = "table.md", "table.csv", "results.json", "picture.png"
LABEL_WIDTH = 24  # of a terminal's first column, at least, where a label is as long
MEASURES = ("nll_increase", "perplexity", "kl_mean", "top1_agreement")
MADE = ("bits_per_parameter", "linear_bits_per_parameter", "activation_bits", "seconds")


@dataclass
class Comparison:
    """Result of `mergequant.compare`.

    Attributes:
        model: name of the float model's folder.
        recipes: what was compared, by label, in the order of the rows.
        texts: names of the evaluation texts; the first is the main one.
        protocol: calibration, evaluation windows, seeds.
        machine: device and versions.
        float_: record of the float model.
        cells: records of the cells that are done.
        folder: where checkpoints, records and tables lie; None if that was temporary.
        notes: what a reader must know.
    """

    model: str
    recipes: Mapping[str, Recipe]
    texts: Sequence[str]
    protocol: Mapping[str, Any]
    machine: Mapping[str, Any]
    float_: Mapping[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """One more cell is done."""
        self.cells.append(record)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per recipe that was tried; None where nothing was measured."""
        tried = {cell["recipe"] for cell in self.cells}
        return [self._row(label) for label in self.recipes if label in tried]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `mergequant compare`."""
        return {
            "model": self.model,
            "rows": self.rows(),
            "float": dict(self.float_),
            "protocol": dict(self.protocol),
            "machine": dict(self.machine),
            "notes": list(self.notes),
            "folder": None if self.folder is None else str(self.folder),
        }

    def markdown(self) -> str:
        """The table, the reasons of rows without figures, and the papers' own figures beside ours."""
        head, *lines = self._cells_of_table()
        parts = [_markdown(head, lines), self._caption()]
        parts += [f"- {row['recipe']}: {row['reason']}" for row in self.rows() if row["reason"]]
        papers = self._papers()
        if papers:
            parts += [PAPERS, _markdown(PAPER_COLUMNS, papers)]
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """All figures unrounded, a line per recipe; empty where nothing was measured."""
        lines = []
        for row in self.rows():
            line = {"recipe": row["recipe"], "model": row["model"]}
            for text in self.texts:
                found = row["texts"].get(text, {})
                line |= {f"{text} {key}": found.get(key) for key in (*MEASURES, "nll_increase_spread")}
            line |= {key: row[key] for key in (*MADE, "peak_memory_bytes")}
            for task in self._tasks():
                found = row["tasks"].get(task, {})
                line |= {f"{task} {key}": found.get(key) for key in ("accuracy", "standard_error")}
            lines.append({**line, "seeds": " ".join(map(str, row["seeds"])), "reason": row["reason"]})
        made = io.StringIO()
        writer = csv.DictWriter(made, lines[0] if lines else ["recipe"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return made.getvalue()

    def tables(self) -> list[Table | str]:
        """For a terminal."""
        head, *lines = self._cells_of_table(tasks=False)
        parts: list[Table | str] = [_table(head, lines)]
        if self._tasks():
            own = [self.float_["tasks"], *(row["tasks"] for row in self.rows())]
            accuracies = [[line[0], *(_accuracy(found.get(task)) for task in self._tasks())] for line, found in zip(
                lines, own, strict=True
            )]  # fmt: skip
            parts.append(_table(["accuracy", *self._tasks()], accuracies))
        parts.append(self._caption())
        parts += [f"{row['recipe']}: {row['reason']}" for row in self.rows() if row["reason"]]
        papers = self._papers()
        if papers:
            parts.append(_table(PAPER_COLUMNS, papers, PAPERS))
        return parts

    def write(self, folder: Path) -> None:
        """Write Markdown, CSV and JSON, each moved into place whole. Raises CheckpointError where the disk refuses."""
        results = json.dumps({**self.to_dict(), "folder": str(folder)}, indent=1, allow_nan=False)
        for name, text in ((TABLE, self.markdown()), (SHEET, self.csv()), (RESULTS, results + "\n")):
            write_bytes(folder / name, text.encode())

    def draw(self, folder: Path) -> None:
        """Write the picture; without matplotlib a note says why there is none."""
        points = [
            Point(row["recipe"], row["linear_bits_per_parameter"] + row["activation_bits"], row["nll_increase"])
            for row in self.rows()
            if row["nll_increase"] is not None
        ]
        made = picture(points, f"{self.model}, {self.texts[0]}")
        if made is None:
            (folder / PICTURE).unlink(missing_ok=True)  # of an earlier run, and of other figures
            self.notes.append(NO_PICTURE)
            self.write(folder)
        else:
            write_bytes(folder / PICTURE, made)

    def files(self) -> list[str]:
        """Names of what `write` and `draw` left in the folder."""
        names = (TABLE, SHEET, RESULTS, PICTURE)
        return [name for name in names if self.folder is not None and (self.folder / name).is_file()]

    def _row(self, label: str) -> dict[str, Any]:
        own = sorted((cell for cell in self.cells if cell["recipe"] == label), key=lambda cell: cell["seed"])
        done = [cell for cell in own if cell["reason"] is None]
        recipe = self.recipes[label]
        texts = {text: _over_seeds([cell["texts"][text] for cell in done]) for text in self.texts if done}
        main = texts.get(self.texts[0], dict.fromkeys((*MEASURES, "nll_increase_spread")))
        memory = [cell["peak_memory_bytes"] for cell in done if cell["peak_memory_bytes"] is not None]
        return {
            "recipe": label,
            "name": recipe.name,
            "parameters": recipe.to_dict()["parameters"],
            "model": self.model,
            "seeds": [cell["seed"] for cell in done],
            "reason": next((cell["reason"] for cell in own if cell["reason"]), None),
            **main,
            **{key: _mean([cell[key] for cell in done]) for key in MADE},
            "peak_memory_bytes": max(memory, default=None),
            "tasks": {
                task: _task([cell["tasks"][task] for cell in done]) for task in (done[0]["tasks"] if done else ())
            },
            "texts": texts,
            "expected": [{**vars(figure), "nll_increase": paper_increase(figure)} for figure in recipe.expected],
        }

    def _tasks(self) -> list[str]:
        return list(self.float_.get("tasks", {}))

    def _cells_of_table(self, tasks: bool = True) -> list[list[str]]:
        """Heading and lines: the float model, then every recipe; with or without tasks."""
        names = self._tasks() if tasks else []
        head = ["recipe"]
        for text in self.texts:
            where = f" {text}" if len(self.texts) > 1 else ""
            head += [f"ppl{where}", f"D{where}", f"KL{where}", f"top-1{where}"]
        head += [*names, "bits/param", "linear bits", "act bits", "s", "peak"]
        lines = [head]
        if self.float_:
            line = ["float"]
            for text in self.texts:
                line += [_shown(self.float_["texts"][text]["perplexity"], "{:.2f}"), "0", "0", "100.0%"]
            line += [_accuracy(self.float_["tasks"][task]) for task in names]
            line += [_shown(self.float_[key], "{:.2f}") for key in ("bits_per_parameter", "linear_bits_per_parameter")]
            lines.append([*line, "-", "-", "-"])
        for row in self.rows():
            line = [row["recipe"] + (" (refused, see below)" if row["reason"] else "")]
            for text in self.texts:
                own = row["texts"].get(text, {})
                line += [_shown(own.get("perplexity"), "{:.2f}"), _with_spread(own, len(row["seeds"]))]
                line += [_shown(own.get("kl_mean"), "{:.4f}"), _shown(own.get("top1_agreement"), "{:.1%}")]
            line += [_accuracy(row["tasks"].get(task)) for task in names]
            line += [_shown(row["bits_per_parameter"], "{:.2f}"), _shown(row["linear_bits_per_parameter"], "{:.2f}")]
            line += [_shown(row["activation_bits"], "{:.1f}"), _shown(row["seconds"], "{:.0f}")]
            lines.append([*line, "-" if row["peak_memory_bytes"] is None else human_bytes(row["peak_memory_bytes"])])
        return lines

    def _caption(self) -> str:
        """How the figures came about, in a few sentences."""
        seeds, calibration = self.protocol["seeds"], self.protocol["calibration"]
        spread = (
            f"mean of {len(seeds)} calibration seeds ± half of highest minus lowest" if len(seeds) > 1 else "one seed"
        )
        texts = "; ".join(
            f"{name}: {found['samples']} windows of {found['seqlen']} tokens with{'' if found['bos'] else 'out'} BOS"
            for name, found in self.protocol["evaluation"].items()
        )
        cache = f" Keys and values of {bits} bits." if (bits := self.protocol["kv_bits"]) < 16 else ""
        return (
            f"{self.model}. D: increase of the mean NLL over float in nats, {spread}. Evaluation: {texts}.{cache} "
            f"Calibration: {calibration['samples']} windows of {calibration['seqlen']} tokens of "
            f"{calibration['data']}. "
            "Bits: all that is stored, scales and indices counted; act bits: mean width of the linear layers' inputs; "
            "s and peak: time and memory of quantizing."
        )

    def _papers(self) -> list[list[str]]:
        """Lines of the papers' figures, ours beside them."""
        where = f"{self.model}, {self.texts[0]}"
        return [line for row in self.rows() for line in paper_lines(row, self.recipes[row["recipe"]].expected, where)]


def _over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means; the perplexity is that of the mean log-likelihood."""
    values = {key: [one[key] for one in found] for key in MEASURES}
    perplexities = values["perplexity"]
    return {
        **{key: _mean(values[key]) for key in MEASURES},
        "perplexity": None if None in perplexities else statistics.geometric_mean(perplexities),
        "nll_increase_spread": max(values["nll_increase"]) - min(values["nll_increase"]),
    }


def _task(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean accuracy over seeds. The standard error is that of one seed: the items are the same for all."""
    accuracies = [one["accuracy"] for one in found]
    return {
        **{key: found[0][key] for key in ("metric", "samples", "chance")},
        "accuracy": _mean(accuracies),
        "standard_error": _mean([one["standard_error"] for one in found]),
        "spread": None if None in accuracies else max(accuracies) - min(accuracies),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _with_spread(found: Mapping[str, Any], seeds: int) -> str:
    if found.get("nll_increase") is None:
        return "-"
    spread = f" ± {found['nll_increase_spread'] / 2:.4f}" if seeds > 1 else ""
    return f"{found['nll_increase']:.4f}{spread}"


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None or found["accuracy"] is None:
        return "-"
    return f"{found['accuracy']:.3f}" + _shown(found["standard_error"], " ± {:.3f}")


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    whole = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(word.replace("|", r"\|") for word in line) + " |" for line in whole)


def _breakable(label: str) -> str:
    """A label whose settings may stand on lines of their own."""
    return label if len(label) <= LABEL_WIDTH else re.sub(r"([:,])(?=[A-Za-z_][\w.]*=)", r"\1 ", label)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for number, word in enumerate(head):
        widest = 0 if number else min(LABEL_WIDTH, max((len(line[0]) for line in lines), default=0))
        right = number and title is None
        table.add_column(word, justify="right" if right else "left", overflow="fold", min_width=widest or None)
    for line in lines:
        table.add_row(_breakable(line[0]), *line[1:])
    return table
