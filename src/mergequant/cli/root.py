"""The group `mergequant`: finds the command, and turns errors into one line and an exit status.

Exit status: 0 done, 2 wrong use, 1 failure, 130 interrupted.
"""

import os
import sys
import traceback
from typing import Any, NoReturn

import click

import mergequant
from mergequant.cli.bench import bench
from mergequant.cli.compare import compare
from mergequant.cli.console import INTERRUPTED, quiet_libraries
from mergequant.cli.demo import demo
from mergequant.cli.eval import eval_command
from mergequant.cli.export import export
from mergequant.cli.generate import generate
from mergequant.cli.group import Group
from mergequant.cli.quantize import quantize
from mergequant.cli.recipes import recipes
from mergequant.cli.serve import serve
from mergequant.errors import MergeQuantError, UsageError

__all__ = ["main"]

FAILURE, WRONG_USE = 1, 2


class CommandLine(Group):
    """The top group: every way to fail ends here."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command line and exit; with `standalone_mode=False` return or raise as click does."""
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            status = run(*args, standalone_mode=False, **extra)
        except click.Abort:
            _fail("interrupted", INTERRUPTED)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see `{context.command_path} --help`)" if context and error.exit_code == WRONG_USE else ""
            _fail(error.format_message() + hint, error.exit_code)
        except MergeQuantError as error:
            _fail(str(error), WRONG_USE if isinstance(error, UsageError) else FAILURE)
        except MemoryError:
            _fail("out of memory; give fewer --samples or a smaller --seqlen", FAILURE)
        except Exception as error:
            _fail(
                f"unexpected {type(error).__name__}: {error}. This is a fault of mergequant or of a library: please "
                "report it with the output of the same command under MERGEQUANT_DEBUG=1",
                FAILURE,
            )
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    if os.environ.get("MERGEQUANT_DEBUG") == "1":
        traceback.print_exc()
    click.secho(f"error: {' '.join(message.split())}", fg="red", err=True)
    sys.exit(status)


@click.group(cls=CommandLine, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mergequant.__version__, prog_name="mergequant", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Quantize language models to 4 bits, measure the result and use it.

    Start with `mergequant demo`, which does all of it on a small bundled model. Wherever a MODEL is asked for, the word
    `tiny` stands for that one.
    """
    quiet_libraries()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (quantize, eval_command, compare, generate, serve, export, bench, recipes, demo):
    main.add_command(command)
