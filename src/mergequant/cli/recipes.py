"""`mergequant recipes`: what can be done to a model, and every parameter of it."""

from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from mergequant.cli.console import Output
from mergequant.cli.group import Group
from mergequant.recipes import list_recipes, load_recipe
from mergequant.recipes.recipe import describe_recipe
from mergequant.recipes.settings import parse_settings

__all__ = ["recipes"]


@click.group(cls=Group, invoke_without_command=True, short_help="List recipes; show one with its parameters.")
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes; `recipes show NAME` prints one with its parameters."""
    if context.invoked_subcommand is not None:
        return
    table = Table("recipe", "what it does", "source", box=box.SIMPLE_HEAD)
    for name in list_recipes():
        table.add_row(name, describe_recipe(name).partition("\n")[0], load_recipe(name).paper)
    Output(None).show(table, "`mergequant recipes show NAME` tells more; `--yaml` gives a file to edit.")


@recipes.command()
@click.argument("name", metavar="NAME_OR_YAML")
@click.option("--set", "pairs", metavar="KEY=VALUE", multiple=True, help="As in `mergequant quantize`.")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the whole recipe as YAML, for `quantize --recipe FILE`.")
def show(name: str, pairs: tuple[str, ...], as_yaml: bool) -> None:
    """Print a recipe: its parameters with their values, its steps, and the paper's own figures."""
    recipe = load_recipe(name).with_settings(parse_settings(pairs))
    if as_yaml:
        click.echo(recipe.to_yaml(), nl=False)
        return
    output = Output(None)
    output.show(f"{recipe.name} ({recipe.paper})", "")
    if recipe.name in list_recipes() and not Path(name).is_file():
        output.show(describe_recipe(name), "")
    if recipe.parameters:
        table = Table("parameter", "value", box=box.SIMPLE_HEAD)
        for key, value in recipe.parameters.items():
            table.add_row(key, _plain(value))
        output.show(table)
    table = Table("step", "with", box=box.SIMPLE_HEAD)
    for step in recipe.steps:
        values = {key: value for key, value in step.to_dict().items() if key != "step"}
        table.add_row(step.name, ", ".join(f"{key}={_plain(value)}" for key, value in values.items()))
    output.show(table, f"prefix: {_plain(recipe.prefix)}")
    for figure in recipe.expected:
        output.show(f"the paper's figure: {figure.metric} {figure.value:g} ({figure.setting}; {figure.source})")


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
