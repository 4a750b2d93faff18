"""`mergequant bench`: speed and memory, against strong bf16 and fp8 baselines."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

import mergequant
from mergequant.bench import (
    BASELINES,
    GEMM_ROWS,
    NEW_TOKENS,
    PHASES,
    SHAPES,
    Cell,
    Phase,
    Request,
    folder_shape,
    named_shape,
    run_bench,
)
from mergequant.checkpoint import QUANT_METHOD
from mergequant.cli.console import Output, Progress
from mergequant.cli.options import BUNDLED, device_option_with, json_option, model_folder
from mergequant.errors import UsageError
from mergequant.integrations.transformers.extract import extract
from mergequant.runtime import KV_BITS, Decoder
from mergequant.steps import near_name

__all__ = ["bench"]

DEFAULT_BATCHES, DEFAULT_CONTEXTS = (1,), (2048,)  # where only the other of the two is given


def _words(known: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback: comma-separated words out of `known`."""

    def parse(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in value.split(",") if word.strip())
        for word in words:
            if word not in known:
                raise click.BadParameter(
                    f"unknown {word!r}{near_name(word, known)}; choose of {', '.join(known)}", context, parameter
                )
        return words

    return parse


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Comma-separated positive integers."""
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(
            f"{value!r}: write positive integers with commas between, as 1,16,64", context, parameter
        )
    return tuple(int(word) for word in words)


def _kvs(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    numbers = _numbers(context, parameter, value) or ()
    if not set(numbers) <= set(KV_BITS):
        raise click.BadParameter(f"{value!r}: caches have {', '.join(map(str, KV_BITS))} bits", context, parameter)
    return numbers


@click.command(short_help="Measure speed and memory against bf16 and fp8.")
@click.argument("name", metavar="DIR_OR_SHAPE")
@click.option(
    "--against",
    default=",".join(BASELINES),
    metavar="a,b",
    show_default=True,
    callback=_words(BASELINES),
    help="Baselines; an empty word for none.",
)
@click.option(
    "--phases",
    default=",".join(PHASES),
    metavar="a,b",
    show_default=True,
    callback=_words(PHASES),
    help="What to measure.",
)
@click.option("--batch", metavar="N,M", callback=_numbers, help="Sequences; rows in `gemm`. Default: a table's worth.")
@click.option("--context", metavar="N,M", callback=_numbers, help="Prompt tokens, or attended positions in `decode`.")
@click.option(
    "--kv", default="16,8,4", metavar="N,M", show_default=True, callback=_kvs, help="Bits of mergequant's cache."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), metavar="N", default=NEW_TOKENS, show_default=True, help="In `e2e`."
)
@click.option(
    "--repeat", type=click.IntRange(min=1), metavar="N", default=3, show_default=True, help="Turns of each scheme."
)
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="Layers of the shape. Default: its own.")
@device_option_with("cuda")
@json_option
@click.pass_context
def bench(
    context_: click.Context,
    name: str,
    against: tuple[str, ...],
    phases: tuple[Phase, ...],
    batch: tuple[int, ...] | None,
    context: tuple[int, ...] | None,
    kv: tuple[int, ...],
    new_tokens: int,
    repeat: int,
    layers: int | None,
    device: str,
    json_out: str | None,
) -> None:
    """Time prefill, decode, generation and single products of a decoder, and what it takes of memory.

    DIR_OR_SHAPE is a checkpoint of `mergequant quantize`, or a float model's folder, whose config gives the shape, or
    one of llama-2-7b, llama-3-8b, qwen3-8b, llama-2-70b-layer. But for the checkpoint's, weights are random; nothing
    is downloaded. All schemes run in one process and take turns, each as CUDA graphs. The last line on stdout is the
    whole report as one JSON document; --json FILE writes it to a file, too.
    """
    output = Output(json_out)
    folder = _folder(name)
    shape = named_shape(name, layers) if folder is None else folder_shape(folder, layers)
    quantized = folder is not None and _is_quantized(folder)
    if quantized and layers is not None:
        raise UsageError("--layers is for shapes; a quantized checkpoint is measured as it is")
    cells: dict[Phase, tuple[Cell, ...]] = {}
    if batch or context:
        own = tuple(Cell(b, c) for b in batch or DEFAULT_BATCHES for c in context or DEFAULT_CONTEXTS)
        cells = dict.fromkeys(phases, own)
    request = Request(
        name=name if folder is None else folder.name,
        shape=shape,
        device=torch.device(device),
        against=against,
        phases=phases,
        cells=cells,
        kvs=kv,
        passes=repeat,
        new_tokens=new_tokens,
        decoder=partial(_decoder_of, folder, torch.device(device)) if folder is not None and quantized else None,
        command=_command(context_),
        gemm_rows=batch or GEMM_ROWS,
    )
    with Progress() as progress:
        try:
            report = run_bench(request, progress.phase)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"the weights of {', '.join((*against, 'w4a8'))} do not fit on {device} together "
                f"({str(error).splitlines()[0]}); give fewer --layers, or one baseline in --against"
            ) from error
    found = report.to_dict()
    output.show(_heading(found), *report.tables(), *(f"note: {note}" for note in report.notes))
    if json_out != "-":
        output.write(found)
    click.echo(json.dumps(found, allow_nan=False))


def _folder(name: str) -> Path | None:
    """The model folder that the argument means, None if it names a shape.

    Raises:
        UsageError: it is neither; near names are suggested.
    """
    if name in SHAPES and not Path(name).is_dir():
        return None
    if name == BUNDLED or Path(name).is_dir():
        return model_folder(name)
    named_shape(name)  # says what is wrong
    return None


def _is_quantized(folder: Path) -> bool:
    """Whether a folder, whose config can be read, is a checkpoint of this project."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def _decoder_of(folder: Path, device: torch.device) -> Decoder:
    """The fast loop's decoder of a checkpoint."""
    return extract(mergequant.load(folder, dtype=torch.bfloat16, device=device, serve=False))


def _heading(found: Mapping[str, Any]) -> str:
    """Shape, device, clocks and versions in a few lines."""
    shape, device = found["shape"], found["device"]
    clocks = "; ".join(
        f"{when}: {now['sm_mhz']:.0f} MHz, {now['watts']:.0f} W, {now['celsius']:.0f} C"
        for when, now in device["clocks"].items()
        if now and None not in (now["sm_mhz"], now["watts"], now["celsius"])
    )
    versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items() if value)
    lines = [
        f"{shape['name']}: {shape['layers']} layers, {shape['parameters'] / 1e9:.3g} G parameters",
        f"{device['name']}" + (f"; clocks {clocks}" if clocks else ""),
        versions,
    ]
    return "\n".join(lines) + "\n"


def _command(context: click.Context) -> str:
    """The command line that makes the same figures: what was given, but for where the report goes."""
    words = ["mergequant", "bench", str(context.params["name"])]
    for option in context.command.params:
        given = option.name and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
        if isinstance(option, click.Option) and given and option.name not in ("json_out", "device"):
            value = context.params[str(option.name)]
            words += [option.opts[0], ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return " ".join(words)
