"""Arguments and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from mergequant.assets import TINY
from mergequant.models.skeleton import local_folder
from mergequant.steps import near_name

__all__ = [
    "BUNDLED",
    "bos_option",
    "data_option",
    "device_option",
    "device_option_with",
    "dtype_option",
    "json_option",
    "model_folder",
    "samples_option",
    "seed_option",
    "seqlen_option",
]

DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUNDLED = "tiny"


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """`cpu`, `cuda` or `cuda:N`; a GPU must be there."""
    kind, _, number = value.partition(":")
    if kind not in DEVICES or (number and (kind == "cpu" or not number.isdecimal())):
        why = f"unknown device {value!r}{near_name(value, DEVICES)}"
    elif kind == "cuda" and not torch.cuda.is_available():
        why = "this torch is a build without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        why = f"{value!r} needs an NVIDIA GPU, and {why}; use --device cpu, or install torch with CUDA"
    elif kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        why = f"{value!r}: there are {torch.cuda.device_count()} GPUs, numbered from 0"
    else:
        return value
    raise click.BadParameter(why, context, parameter)


def _dtype(context: click.Context, parameter: click.Parameter, value: str | None) -> torch.dtype | None:
    """A float type by name."""
    if value is not None and value not in DTYPES:
        raise click.BadParameter(f"unknown dtype {value!r}{near_name(value, DTYPES)}", context, parameter)
    return None if value is None else DTYPES[value]


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def device_option_with(default: str) -> Decorator:
    """`--device`."""
    return click.option(
        "--device", callback=_device, metavar="[cpu|cuda]", default=default, show_default=True, help="What computes."
    )


device_option = device_option_with("cpu")
dtype_option = click.option(
    "--dtype", callback=_dtype, metavar=f"[{'|'.join(DTYPES)}]", help="Of hidden states. Default: as saved."
)
json_option = click.option(
    "--json",
    "json_out",
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    help="Write the results as JSON to FILE. Without FILE, or with `-`, to stdout, and nothing else there.",
)
seed_option = click.option("--seed", type=click.IntRange(min=0), metavar="S", default=0, show_default=True)
bos_option = click.option(
    "--bos/--no-bos", default=None, help="Begin every window with BOS. Default: if the tokenizer has one."
)


def samples_option(text: str, default: int | None) -> Decorator:
    """`--samples`: a number of windows."""
    return click.option(
        "--samples", type=click.IntRange(min=1), metavar="N", default=default, show_default=True, help=text
    )


def seqlen_option(text: str, default: int | None) -> Decorator:
    """`--seqlen`: tokens of a window."""
    return click.option(
        "--seqlen", type=click.IntRange(min=2), metavar="L", default=default, show_default=True, help=text
    )


def data_option(text: str, default: str | None) -> Decorator:
    """`--data`: where text comes from."""
    kinds = (
        "`self` (sampled from the float model), a .txt/.jsonl/.parquet file or folder, hf:NAME[:CONFIG][:SPLIT], "
        "or a mix like a.txt*0.7+self*0.3."
    )
    return click.option(
        "--data", metavar="D", default=default, required=default is None, show_default=True, help=f"{text}: {kinds}"
    )


def model_folder(text: str) -> Path:
    """The folder that a MODEL or DIR argument means: a local one, the bundled one (`tiny`), or one of the hub.

    Raises:
        ModelError: there is none, with near names.
    """
    return TINY if text == BUNDLED and not Path(text).exists() else local_folder(text)
