"""`mergequant eval`: how good is a model, and how far is it from the float one."""

from pathlib import Path
from typing import Literal

import click
import torch

import mergequant
from mergequant.cli.console import Output, Progress
from mergequant.cli.options import (
    bos_option,
    data_option,
    device_option,
    dtype_option,
    json_option,
    model_folder,
    samples_option,
    seed_option,
    seqlen_option,
)
from mergequant.errors import UsageError
from mergequant.eval import FLOAT_KV_BITS, KV_CHOICES

__all__ = ["eval_command"]


@click.command(name="eval", short_help="Measure a model, and its distance to the float one.")
@click.argument("model", metavar="A")
@click.option("--against", metavar="B", help="The float model: adds KL divergence and top-1 agreement.")
@data_option("Text that was not used for calibration", None)
@samples_option("Windows, from the start of the text. Default: all (`self` needs a number).", None)
@seqlen_option("Tokens of a window.", 512)
@click.option("--stride", type=click.IntRange(min=1), metavar="N", help="Tokens between windows. Default: no overlap.")
@bos_option
@seed_option
@click.option(
    "--kv",
    type=click.Choice([str(bits) for bits in KV_CHOICES]),
    default=str(FLOAT_KV_BITS),
    show_default=True,
    help="Bits of the keys and values that A attends to, as while it generates; 16: as the model makes them.",
)
@click.option("--tasks", metavar="a,b", help="Zero-shot tasks (needs the extra `eval`).")
@click.option(
    "--task-data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder with the tasks' .jsonl files; without it lm-eval downloads its own.",
)
@click.option("--task-samples", type=click.IntRange(min=1), metavar="N", help="Items per task. Default: all.")
@device_option
@dtype_option
@json_option
def eval_command(
    model: str,
    against: str | None,
    data: str | None,
    samples: int | None,
    seqlen: int,
    stride: int | None,
    bos: bool | None,
    seed: int,
    kv: str,
    tasks: str | None,
    task_data: Path | None,
    task_samples: int | None,
    device: str,
    dtype: torch.dtype | None,
    json_out: str | None,
) -> None:
    """Measure model A: perplexity, size and speed; with --against B also its distance to the float model B.

    Refuses data that overlaps what A was calibrated on.
    """
    if data is None:
        raise UsageError(
            "--data is missing: say what text to measure on, a .txt file or folder, hf:NAME, or self with --against"
        )
    output = Output(json_out)
    first, second = model_folder(model), model_folder(against) if against is not None else None
    start: bool | Literal["auto"] = "auto" if bos is None else bos
    with Progress() as progress:
        progress.phase("evaluating")
        report = mergequant.evaluate(
            first,
            second,
            data=data,
            samples=samples,
            seqlen=seqlen,
            stride=stride,
            bos=start,
            seed=seed,
            tasks=tasks,
            task_data=task_data,
            task_samples=task_samples,
            device=device,
            dtype=dtype,
            kv_bits=int(kv),
        )
    output.show(report.table())
    if report.tasks:
        output.show(report.task_table())
    output.write(report.to_dict())
