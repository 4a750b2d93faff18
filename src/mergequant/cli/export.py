"""`mergequant export`: a checkpoint in the layout of another engine."""

from pathlib import Path

import click
import torch

from mergequant.cli.console import Output
from mergequant.cli.options import dtype_option, json_option, model_folder
from mergequant.eval import human_bytes
from mergequant.integrations.compressed_tensors import FORMATS
from mergequant.integrations.compressed_tensors import export as export_checkpoint

__all__ = ["export"]


@click.command(short_help="Write a checkpoint for an unmodified vLLM.")
@click.argument("folder", metavar="DIR")
@click.option("--format", "layout", type=click.Choice(FORMATS), default=FORMATS[0], show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR2", required=True, help="Folder to write.")
@dtype_option
@json_option
def export(folder: str, layout: str, out: Path, dtype: torch.dtype | None, json_out: str | None) -> None:
    """Write the quantized checkpoint in DIR as one that an engine without this project's plugin serves.

    Layers with integer inputs become W8A8 (weights take a byte each), weight-only ones stay 4 or 8 bits. What cannot be
    expressed exactly (a prefix, online rotations, staggered copies) is refused with the reason. What gives other bits
    all the same (a wider clamp, a lost clip ratio, gains in 16 bits) is listed.
    """
    output = Output(json_out)
    made = export_checkpoint(model_folder(folder), out, format=layout, dtype=dtype)
    layers = "; ".join(f"{count} x {scheme}" for scheme, count in made.schemes.items())
    output.show(f"{made.out}: {human_bytes(made.size)}, {layers}")
    output.show(*(f"differs: {text}" for text in made.differences))
    output.show("serve it: " + f"vllm serve {made.out}")
    output.write(made.to_dict())
