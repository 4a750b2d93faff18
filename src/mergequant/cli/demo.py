"""`mergequant demo`: the main job on the bundled model, offline, in a minute or two.

No text written by others is shipped with the package, so the float model writes the text itself: sequences sampled with
one seed calibrate, sequences sampled with another evaluate. With `--data FILE` the first part of a text of one's own
evaluates, and the rest calibrates.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

import click
from rich import box
from rich.table import Table

import mergequant
from mergequant.assets import TINY
from mergequant.cli.console import Output, Progress, resumable
from mergequant.cli.generate import prompt_tokens, write_text
from mergequant.cli.options import json_option
from mergequant.data.sources import iterate_text
from mergequant.data.spec import HubSource, PathSource, parse_data
from mergequant.errors import UsageError
from mergequant.eval import ModelReport, Report, human_bytes, load_model, load_tokenizer
from mergequant.recipes import load_recipe

__all__ = ["demo"]

BASELINE = "rtn"
SAMPLES, SEQLEN, EVALUATION_WINDOWS = 32, 256, 32
CALIBRATION_SEED, EVALUATION_SEED = 0, 1
EVALUATION_SHARE = 0.25  # of the user's text
MOST_TEXT = 4_000_000  # characters of the user's text; far more than the windows need
PROMPT = "The history of the city"
NEW_TOKENS = 60


@click.command(short_help="All of it on the bundled model, offline.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("demo-out"),
    show_default=True,
    help="Folder for the two checkpoints.",
)
@click.option("--data", metavar="FILE", help="A text of your own, in place of sequences sampled from the float model.")
@click.option("--recipe", metavar="NAME_OR_YAML", default="mergequant-plus", show_default=True)
@json_option
def demo(out: Path, data: str | None, recipe: str, json_out: str | None) -> None:
    """Quantize the bundled model, verify, compare it with the float model, and generate text with it."""
    output = Output(json_out)
    chosen = load_recipe(recipe)
    calibration, evaluation = ("self", "self") if data is None else _split_text(data)
    output.show(
        "The bundled model: Llama architecture, 6.5 M parameters. Quantized twice: W4A4 rounded to nearest with a "
        f"scale per token (the usual way), and with {chosen.name}.",
        "Calibrated and evaluated on sequences that the float model writes itself, with different seeds."
        if data is None
        else f"Evaluated on the first {EVALUATION_SHARE:.0%} of {data}, calibrated on the rest.",
        "",
    )
    reports: dict[str, Report] = {}
    folders: dict[str, Path] = {}
    _make_folder(out)
    with resumable(out), Progress() as progress:
        for label, one in {"W4A4 per-token RTN": load_recipe(BASELINE), chosen.name: chosen}.items():
            folders[label] = out / one.name
            progress.phase(f"quantizing: {label}")
            mergequant.quantize(
                TINY,
                one,
                data=calibration,
                out=folders[label],
                samples=SAMPLES,
                seqlen=SEQLEN,
                seed=CALIBRATION_SEED,
                resume=_goes_on(folders[label]),
                reporter=progress,
            )
            progress.phase(f"evaluating: {label}")
            reports[label] = mergequant.evaluate(
                folders[label], TINY, data=evaluation, samples=EVALUATION_WINDOWS, seqlen=SEQLEN, seed=EVALUATION_SEED
            )
    label = list(reports)[-1]
    if json_out != "-":
        output.show(f"Text written by {label} (a model this small rambles, and so does the float one):", "")
        tokenizer = load_tokenizer(folders[label])
        write_text(load_model(folders[label]), tokenizer, prompt_tokens(tokenizer, PROMPT), NEW_TOKENS, 0.8, seed=0)
    output.show(_table(reports))
    place = shlex.quote(str(folders[label]))
    output.show(
        "Each checkpoint was reloaded from disk and gave the same logits, bit for bit, as the model in memory.",
        "KL = how far the next-token distribution is from the float model's, in nats; top-1 = how often both "
        "prefer the same token.",
        "",
        "Next:",
        f'  mergequant generate {place} "Once upon a time"',
        "  mergequant quantize YOUR_MODEL_FOLDER --data YOUR_TEXT.txt --out model-w4a8",
    )
    output.write({label: report.to_dict() for label, report in reports.items()})


def _table(reports: Mapping[str, Report]) -> Table:
    """The table that the demo ends with: the float model, and each quantized one."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("model")
    for column in ("perplexity", "KL", "top-1", "size", "bits/param", "in linears"):
        table.add_column(column, justify="right")
    exact = next((report.float_ for report in reports.values() if report.float_), None)
    if exact is not None:
        table.add_row("float (bfloat16)", *_row(exact, "-", "-"))
    for name, report in reports.items():
        if report.quantized is not None and report.divergence is not None:
            distance = report.divergence
            table.add_row(name, *_row(report.quantized, f"{distance.kl_mean:.3f}", f"{distance.top1_agreement:.1%}"))
    return table


def _row(model: ModelReport, kl: str, top1: str) -> list[str]:
    size = model.size
    linear = "-" if size.linear_bits_per_parameter is None else f"{size.linear_bits_per_parameter:.2f}"
    return [
        f"{model.likelihood.perplexity:.1f}",
        kl,
        top1,
        human_bytes(size.bytes),
        f"{size.bits_per_parameter:.2f}",
        linear,
    ]


def _split_text(data: str) -> tuple[list[str], list[str]]:
    """Texts to calibrate with and to evaluate on, from one source. Raises DataError, UsageError."""
    parts = parse_data(data).parts
    if len(parts) != 1 or not isinstance(parts[0].source, PathSource | HubSource):
        raise UsageError(f"--data {data}: the demo takes one file, folder or hf:NAME")
    text = ""
    for fragment in iterate_text(parts[0].source):
        text += fragment
        if len(text) > MOST_TEXT:
            break
    border = int(len(text) * EVALUATION_SHARE)
    return [text[border:]], [text[:border]]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made ({error.strerror}); choose another folder") from error


def _goes_on(folder: Path) -> bool:
    """Whether to go on with an interrupted run. A finished one of an earlier demo is replaced: it is cheap to make."""
    return not (folder / "config.json").exists()
