"""`mergequant compare`: many recipes on one model, measured on the same windows, in one table."""

import json
import time
from pathlib import Path

import click

import mergequant
from mergequant.cli.console import Output, Progress, human_time, resumable
from mergequant.cli.options import (
    bos_option,
    data_option,
    device_option,
    json_option,
    model_folder,
    samples_option,
    seqlen_option,
)
from mergequant.comparison.run import WINDOWS, text_name
from mergequant.data import DataSpec, parse_data
from mergequant.errors import UsageError
from mergequant.eval import FLOAT_KV_BITS, KV_CHOICES
from mergequant.recipes.settings import parse_recipes

__all__ = ["compare"]


@click.command(short_help="Lay recipes side by side, on the same ground.")
@click.argument("model")
@click.option(
    "--recipes",
    required=True,
    metavar="a,b,c",
    help="Names or YAML files, with settings behind a colon: rtn,mergequant:split=0.05,other=static,mine.yaml",
)
@data_option("Calibration text", "self")
@click.option(
    "--eval",
    "texts",
    multiple=True,
    required=True,
    metavar="E",
    help="Text to measure on, as --data; may be repeated. Figures at the top of a JSON row are of the first one.",
)
@click.option("--tasks", metavar="a,b", help="Zero-shot tasks (needs the extra `eval`).")
@click.option(
    "--task-data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder with the tasks' .jsonl files; without it lm-eval downloads its own.",
)
@click.option("--task-samples", type=click.IntRange(min=1), metavar="N", help="Items per task. Default: all.")
@click.option(
    "--seeds", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Calibrations per recipe."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    default=Path("compare-out"),
    show_default=True,
    help="Folder of checkpoints, records and tables; given again, what is done is taken from there.",
)
@samples_option("Calibration windows.", 128)
@seqlen_option("Tokens of a window. Default: 512, or the model's limit.", None)
@click.option(
    "--eval-samples",
    type=click.IntRange(min=1),
    metavar="N",
    default=WINDOWS,
    show_default=True,
    help="Windows to measure on, from the start of each text.",
)
@bos_option
@click.option(
    "--kv",
    type=click.Choice([str(bits) for bits in KV_CHOICES]),
    default=str(FLOAT_KV_BITS),
    show_default=True,
    help="Bits of the keys and values that are attended to while measuring.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Cells at a time."
)
@device_option
@json_option
def compare(
    model: str,
    recipes: str,
    data: str,
    texts: tuple[str, ...],
    tasks: str | None,
    task_data: Path | None,
    task_samples: int | None,
    seeds: int,
    out: Path,
    samples: int,
    seqlen: int | None,
    eval_samples: int,
    bos: bool | None,
    kv: str,
    workers: int,
    device: str,
    json_out: str | None,
) -> None:
    """Quantize MODEL with each recipe and seed, and measure all on the same windows, beside the float model.

    Writes table.md, table.csv, results.json and, with the extra `plots`, picture.png into DIR. A recipe that cannot
    serve the model becomes a row with the reason. An interrupted run goes on when the same command is given again.
    """
    output = Output(json_out)
    chosen = parse_recipes(recipes)
    parse_data(data)
    evaluation = _named(texts)
    folder = model_folder(model)
    started = time.perf_counter()
    with resumable(out, "what is done is kept in"), Progress() as progress:
        report = mergequant.compare(
            folder,
            chosen,
            evaluation=evaluation,
            data=data,
            tasks=tasks,
            task_data=task_data,
            task_samples=task_samples,
            seeds=seeds,
            out=out,
            samples=samples,
            seqlen=seqlen,
            windows=eval_samples,
            bos=bos,
            kv_bits=int(kv),
            device=device,
            workers=workers,
            reporter=progress,
        )
    output.show(*report.tables(), *(f"note: {note}" for note in report.notes))
    output.show(f"in {out}: {', '.join(report.files())}; {human_time(time.perf_counter() - started)}")
    if json_out == "-":
        click.echo(json.dumps(report.to_dict(), allow_nan=False))
    else:
        output.write(report.to_dict())


def _named(texts: tuple[str, ...]) -> dict[str, DataSpec]:
    """Evaluation texts by the names that the table gives them: the files' stems, numbered where they repeat."""
    found: dict[str, DataSpec] = {}
    for text in texts:
        spec = parse_data(text)
        if spec in found.values():
            raise UsageError(f"--eval {text} is given twice; leave one out")
        name = text_name(spec)
        found[name if name not in found else f"{name} {len(found) + 1}"] = spec
    return found
