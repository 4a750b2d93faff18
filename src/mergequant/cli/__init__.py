"""The command line: one file per command. Commands parse, call the API and print; they hold no mathematics."""

from mergequant.cli.root import main

__all__ = ["main"]
