"""What an evaluation found, as an object, as JSON and as a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from mergequant.eval.perplexity import Divergence, Likelihood
from mergequant.eval.size import Size

__all__ = ["FLOAT_KV_BITS", "ModelReport", "Report", "human_bytes", "results_table"]

FLOAT_KV_BITS = 16  # stands for keys and values as the model makes them, whatever its dtype


@dataclass(frozen=True)
class ModelReport:
    """Figures of one model: how well it predicts, and how large it is on disk."""

    likelihood: Likelihood
    size: Size

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; nll in nats per token, sizes in bytes and bits."""
        return {
            "perplexity": self.likelihood.perplexity,
            "nll": self.likelihood.nll,
            "nll_standard_error": self.likelihood.nll_standard_error,
            "bits_per_parameter": self.size.bits_per_parameter,
            "linear_bits_per_parameter": self.size.linear_bits_per_parameter,
            "bytes": self.size.bytes,
            "parameters": self.size.parameters,
            "tokens_per_second": self.likelihood.tokens_per_second,
        }


@dataclass(frozen=True)
class Report:
    """Result of `mergequant.evaluate`.

    quantized: figures of the quantized model, None if only a float model was evaluated. float_: those of the float
    model, None if there was none to compare with. divergence: distance between the two. protocol: all that is needed to
    repeat the measurement. tasks: per task and model, accuracy with its standard error.
    """

    quantized: ModelReport | None
    float_: ModelReport | None
    divergence: Divergence | None
    protocol: Mapping[str, Any]
    tasks: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `mergequant eval --json`; figures that were not measured are null."""
        distance = self.divergence
        return {
            "quantized": self.quantized.to_dict() if self.quantized else None,
            "float": self.float_.to_dict() if self.float_ else None,
            "kl_mean": distance.kl_mean if distance else None,
            "kl_p99": distance.kl_p99 if distance else None,
            "top1_agreement": distance.top1_agreement if distance else None,
            "nll_increase": distance.nll_increase if distance else None,
            "nll_increase_standard_error": distance.nll_increase_standard_error if distance else None,
            "protocol": dict(self.protocol),
            "tasks": dict(self.tasks),
        }

    def table(self, name: str = "quantized") -> Table:
        """A table for people, with one row per model."""
        return results_table({name: self})

    def task_table(self) -> Table:
        """Accuracies with standard errors, one row per task."""
        table = Table("task", "metric", "n", "chance")
        models = sorted({model for task in self.tasks.values() for model in task["models"]})
        for model in models:
            table.add_column(model, justify="right")
        for task, result in self.tasks.items():
            cells = [_accuracy(result["models"].get(model)) for model in models]
            chance = "-" if result["chance"] is None else f"{result['chance']:.3f}"
            table.add_row(task, result["metric"], str(result["samples"]), chance, *cells)
        return table


def results_table(reports: Mapping[str, Report]) -> Table:
    """One row for the float model and one for each named report; all must come from one protocol."""
    title = _title(next(iter(reports.values())).protocol) if reports else None
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)  # must fit 80 columns
    table.add_column("model", overflow="fold")
    for column in ("perplexity", "ΔNLL", "KL mean", "KL p99", "top-1", "bits/param", "size", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    exact = next((report.float_ for report in reports.values() if report.float_), None)
    if exact is not None:
        table.add_row("float", *_row(exact, None))
    for name, report in reports.items():
        if report.quantized is not None:
            table.add_row(name, *_row(report.quantized, report.divergence))
    return table


def _title(protocol: Mapping[str, Any]) -> str:
    stride = f", stride {protocol['stride']}" if protocol["stride"] else ""
    start = "with" if protocol["bos"] else "without"
    cache = f", {bits}-bit keys and values" if (bits := protocol["kv_bits"]) < FLOAT_KV_BITS else ""
    text = f"{protocol['data']}: {protocol['samples']} windows of {protocol['seqlen']} tokens{stride}, {start} BOS"
    return text + cache


def _row(model: ModelReport, distance: Divergence | None) -> list[str]:
    shown = model.likelihood
    return [
        f"{shown.perplexity:.4g}" if math.isfinite(shown.perplexity) else "overflow",
        f"{distance.nll_increase:+.4f}" if distance else "-",
        f"{distance.kl_mean:.4f}" if distance else "-",
        f"{distance.kl_p99:.3f}" if distance else "-",
        f"{distance.top1_agreement:.1%}" if distance else "-",
        f"{model.size.bits_per_parameter:.2f}",
        human_bytes(model.size.bytes),
        f"{shown.tokens_per_second:,.0f}",
    ]


def _accuracy(value: Mapping[str, Any] | None) -> str:
    return "-" if value is None else f"{value['accuracy']:.3f} ± {value['standard_error']:.3f}"


def human_bytes(count: float) -> str:
    """A number of bytes with three digits and a decimal unit: 6.9 MB."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
