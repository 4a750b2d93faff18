"""What commands print: results on stdout, progress on stderr, JSON where it is asked for."""

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import rich.progress
import transformers
from rich.console import Console, RenderableType
from rich.text import Text

from mergequant.errors import UsageError

__all__ = ["INTERRUPTED", "Output", "Progress", "human_time", "quiet_libraries", "resumable"]

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
PLAIN_WIDTH = 110  # columns when the output is no terminal


class Interrupted(click.ClickException):
    """Ctrl-C, with advice."""

    exit_code = INTERRUPTED


class Output:
    """Results: tables for people, and JSON.

    Args:
        json_out: None, a file, or "-" for stdout, where then nothing but the JSON appears.

    Raises:
        UsageError: the file cannot be written; found out before any work is done.
    """

    def __init__(self, json_out: str | None) -> None:
        self.json_out = json_out
        if json_out not in (None, "-"):
            folder = Path(str(json_out)).absolute().parent
            if Path(str(json_out)).is_dir():
                raise UsageError(f"--json {json_out}: this is a folder; name a file in it")
            if not os.access(folder, os.W_OK):
                raise UsageError(
                    f"--json {json_out}: {folder} does not exist or cannot be written; choose another file"
                )

    def show(self, *parts: RenderableType) -> None:
        """Print for people. Strings are printed as they are, without markup."""
        if self.json_out == "-":
            return
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        for part in parts:
            console.print(part, markup=False, soft_wrap=isinstance(part, str))

    def write(self, data: Mapping[str, Any]) -> None:
        """Write the JSON, if it was asked for. Infinite values, which JSON does not have, become null."""
        if self.json_out is None:
            return
        text = json.dumps(_finite(data), indent=2, default=str, allow_nan=False)
        if self.json_out == "-":
            click.echo(text)
            return
        partial = Path(self.json_out + ".tmp")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.json_out)


class Progress:
    """Progress of a run on stderr: a bar on a terminal, a line for each phase and block elsewhere.

    It is a `mergequant.pipeline.Reporter` and a context manager.

    Attributes:
        blocks: number of blocks reported so far.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.blocks = 0
        self.started = self._phase_started = time.perf_counter()
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            _Clock(self),
        )
        self._bar = rich.progress.Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task("starting", total=None, note="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def phase(self, text: str) -> None:
        """A new phase begins, of unknown length."""
        self._phase_started = time.perf_counter()
        self._bar.reset(self._task, description=text, note="")
        self._bar.update(self._task, total=None)
        self._line(text)

    def progress(self, text: str) -> None:
        """How far a step is that takes long, beside the bar; a line of its own where there is no bar."""
        self._bar.update(self._task, note=text)
        self._line(text)

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        """A block is done, the `index`-th of `total`."""
        self.blocks += 1
        loss = f"error {figures['output_error']:.4f}" if "output_error" in figures else ""
        self._bar.update(
            self._task, description=f"{name} ({index} of {total})", total=total, completed=index, note=loss
        )
        self._line(
            ", ".join(word for word in (f"block {index} of {total}", name, loss, self.left(index, total)) if word)
        )

    def left(self, done: float, total: float | None) -> str:
        """Time left, if the rest takes as long as what is done."""
        if not total or not done or done >= total:
            return ""
        return f"{human_time((time.perf_counter() - self._phase_started) * (total - done) / done)} left"

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            elapsed = human_time(time.perf_counter() - self.started)
            self.console.print(f"{elapsed:>6}  {text}", markup=False, soft_wrap=True)


class _Clock(rich.progress.ProgressColumn):
    """Time since the start, and time left as it was estimated when the last block was done."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._estimate = (0.0, "")

    def render(self, task: rich.progress.Task) -> Text:
        """Called by rich several times a second."""
        if task.completed != self._estimate[0]:
            self._estimate = task.completed, self._progress.left(task.completed, task.total)
        elapsed = human_time(time.perf_counter() - self._progress.started)
        return Text(f"{elapsed} elapsed" + (f", about {self._estimate[1]}" if self._estimate[1] else ""))


@contextmanager
def resumable(out: Path, kept: str = "blocks that are done are kept beside") -> Iterator[None]:
    """Tell a user who presses Ctrl-C how to go on; `kept` says what is kept, and where with regard to `out`.

    Raises:
        Interrupted: in place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {kept} {out}: the same command, with the same --out, goes on after them"
        ) from None


def quiet_libraries() -> None:
    """Silence other libraries' progress bars and advice; what matters here is raised as an error."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def human_time(seconds: float) -> str:
    """A duration with two units at most: 8 s, 2:05, 1:02:07."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
