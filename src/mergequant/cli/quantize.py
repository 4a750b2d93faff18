"""`mergequant quantize`: a model and a recipe in, a verified checkpoint out."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import RenderableType
from rich.table import Table

import mergequant
from mergequant.cli.console import Output, Progress, human_time, resumable
from mergequant.cli.options import (
    bos_option,
    data_option,
    device_option,
    json_option,
    model_folder,
    samples_option,
    seed_option,
    seqlen_option,
)
from mergequant.data import parse_data
from mergequant.eval import human_bytes
from mergequant.pipeline import Plan, Quantized
from mergequant.recipes import load_recipe
from mergequant.recipes.settings import parse_settings

__all__ = ["quantize"]

WORST_SITES = 3
DEFAULT_RECIPE = "mergequant-w4a8"


@click.command(short_help="Make a 4-bit checkpoint of a model.")
@click.argument("model")
@click.option(
    "--recipe",
    metavar="NAME_OR_YAML",
    default=DEFAULT_RECIPE,
    show_default=True,
    help="A name that `mergequant recipes` lists, or a YAML file.",
)
@data_option("Calibration text", "self")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the checkpoint.")
@samples_option("Calibration windows.", 128)
@seqlen_option("Tokens of a window. Default: 512, or the model's limit.", None)
@seed_option
@device_option
@click.option(
    "--set",
    "pairs",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a parameter of the recipe (split=0) or of one step (clip.mode=none). May be repeated.",
)
@click.option(
    "--average-bits",
    type=float,
    metavar="B",
    help="Choose a width for every site, by what it costs, so that weights take B bits on average, scales included.",
)
@bos_option
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-resume", is_flag=True, help="Start anew, and replace a checkpoint of ours that is there.")
@json_option
def quantize(
    model: str,
    recipe: str,
    data: str,
    out: Path | None,
    samples: int,
    seqlen: int | None,
    seed: int,
    device: str,
    pairs: tuple[str, ...],
    average_bits: float | None,
    bos: bool | None,
    dry_run: bool,
    no_resume: bool,
    json_out: str | None,
) -> None:
    """Quantize MODEL (a folder of transformers, `org/name` of the hub, or `tiny`) and write a checkpoint.

    The checkpoint is reloaded from disk and compared with the model in memory before it appears at DIR. A run that was
    interrupted goes on when the same command is given again.
    """
    if out is None and not dry_run:
        raise click.UsageError("--out DIR is missing: where shall the checkpoint go? (--dry-run needs none)")
    output = Output(json_out)
    chosen = load_recipe(recipe)
    settings = parse_settings(pairs)
    if average_bits is not None:
        settings["average_bits"] = average_bits
    if settings:
        chosen = chosen.with_settings(settings)
    parse_data(data)  # a typo shows before the model is read
    folder = model_folder(model)
    if dry_run or out is None:
        plan = mergequant.plan(folder, chosen, samples=samples, seqlen=seqlen)
        output.show(*plan_view(plan))
        output.write(plan.to_dict())
        return
    started = time.perf_counter()
    with resumable(out), Progress() as progress:
        result = mergequant.quantize(
            folder,
            chosen,
            data=data,
            out=out,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            device=device,
            bos=bos,
            resume=not no_resume,
            reporter=progress,
        )
    seconds = time.perf_counter() - started
    output.show(*summary_view(result, chosen.name, seconds, fresh=progress.blocks > 0))
    text = "self --samples 24" if data == "self" else "OTHER_TEXT.txt"
    place, origin = shlex.quote(str(out)), shlex.quote(model)
    if "nll_increase" in result.figures["held_out"]:
        output.show(
            "Next:",
            f"  mergequant eval {place} --against {origin} --data {text}",
            f'  mergequant generate {place} "Once upon a time"',
        )
    else:
        output.show("Next:", f"  mergequant.load({str(out)!r}) in Python gives a model of transformers")
    output.write({"folder": str(out), "recipe": chosen.to_dict(), "seconds": seconds, "figures": result.figures})


def summary_view(result: Quantized, recipe: str, seconds: float, *, fresh: bool) -> list[RenderableType]:
    """What came out: size, time, and the sites with the largest error."""
    figures = result.figures
    table = Table(box=box.SIMPLE_HEAD, show_header=False, padding=(0, 1))
    table.add_row("checkpoint", f"{result.folder}" + ("" if fresh else " (was complete already, checked again)"))
    table.add_row("recipe", recipe)
    table.add_row("size", f"{human_bytes(figures['bytes'])}, {figures['bits_per_parameter']:.2f} bits per parameter")
    table.add_row(
        "linear layers",
        f"{human_bytes(figures['linear_bytes'])}, {figures['linear_bits_per_parameter']:.2f} bits per parameter",
    )
    if held_out := figures.get("held_out"):
        table.add_row("on held-out data", held_out_view(held_out))
    for row, (name, error) in enumerate(_worst_sites(figures["sites"])):
        table.add_row("" if row else "largest error", f"{error:.4f} at {name}")
    if figures.get("kept_float"):
        table.add_row("kept in float", ", ".join(figures["kept_float"]))
    table.add_row("KV cache", figures.get("kv_cache", "none"))
    table.add_row("time", human_time(seconds))
    note = "error = squared error of a site's outputs against float weights on the same held-out input, relative"
    return [table, note]


def held_out_view(figures: Mapping[str, float]) -> str:
    """What quantizing cost, in words: in nats for a language model, else as relative errors of all outputs."""
    words = []
    if "nll_increase" in figures:
        words.append(f"NLL {figures['nll_increase']:+.4f} over float")
    for key, value in figures.items():
        if key.endswith("_error"):
            words.append(f"{key.removesuffix('_error').replace('_', ' ')} off by {value:.2%}")
    if "kl_mean" in figures:
        words += [f"KL {figures['kl_mean']:.4f}", f"top-1 agreement {figures['top1_agreement']:.1%}"]
    return ", ".join(words)


def _worst_sites(sites: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[tuple[str, float]]:
    errors = {
        f"{block}.{site}": figures["output_error"]
        for block, inside in sites.items()
        for site, figures in inside.items()
        if "output_error" in figures
    }
    return sorted(errors.items(), key=lambda item: -item[1])[:WORST_SITES]


def plan_view(plan: Plan) -> list[RenderableType]:
    """The plan for people: equal blocks once, then what it takes and which backends run."""
    blocks: dict[str, list[Any]] = {}
    for site in plan.sites:
        blocks.setdefault(site.block, []).append(site)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for block, sites in blocks.items():
        look = tuple((s.site, s.kind, tuple(s.linears.items()), s.weights, s.inputs, s.steps) for s in sites)
        groups.setdefault(look, []).append(block)
    parts: list[RenderableType] = []
    for look, names in groups.items():
        span = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} equal blocks)"
        table = Table("site", "linears", "weights", "input", title=span, box=box.SIMPLE_HEAD, title_justify="left")
        for site, _, linears, weights, inputs, _ in look:
            shapes = "\n".join(f"{name.rpartition('.')[2]} {'x'.join(map(str, shape))}" for name, shape in linears)
            table.add_row(site, shapes, weights, inputs)
        parts.append(table)
    quantized = plan.linear_parameters / plan.parameters
    parts += [f"recipe {plan.recipe}: {plan.linear_parameters:,} of {plan.parameters:,} parameters ({quantized:.0%})"]
    parts += [f"stays in float: {name} ({why})" for name, why in plan.kept.items()]
    parts += [
        "stays in float: embeddings, head, final norm (no linear of a block)",
        f"peak memory about {human_bytes(plan.peak_bytes)}, disk about {human_bytes(plan.disk_bytes)}, "
        f"time about {human_time(plan.seconds)} on two CPU cores (without sampling data; corrected while it runs)",
    ]
    table = Table("op", box=box.SIMPLE_HEAD, title="backends", title_justify="left")
    architectures = list(dict.fromkeys(choice.architecture for choice in plan.backends))
    for architecture in architectures:
        table.add_column(architecture)
    for op in dict.fromkeys(choice.op for choice in plan.backends):
        chosen = {choice.architecture: choice.backend for choice in plan.backends if choice.op == op}
        table.add_row(op, *(chosen.get(architecture, "-") for architecture in architectures))
    reasons: dict[tuple[str, str], list[str]] = {}
    for choice in plan.backends:
        reasons.setdefault((choice.op, choice.reason), []).append(choice.architecture)
    parts += [table, *(f"{op} on {', '.join(where)}: {why}" for (op, why), where in reasons.items() if "int" in op)]
    return [*parts, "all other ops: reference in plain torch"]
