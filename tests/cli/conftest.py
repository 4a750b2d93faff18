"""Command lines on the bundled model, with windows so short that each takes a second or two."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers.utils import logging

from mergequant.cli import main

WINDOWS = ["--samples", "2", "--seqlen", "32"]
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _libraries_as_before() -> Iterator[None]:
    """Commands silence transformers for their process, which the other tests of this one must not feel."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    generator = torch.random.get_rng_state()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    torch.random.set_rng_state(generator)


def invoke(*args: object, **extra: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="mergequant", **extra)  # type: ignore[arg-type]


@pytest.fixture
def run() -> Run:
    """Run a command line in this process."""
    return invoke


def _write_words(path: Path, seed: int) -> Path:
    """A text of words in random order: two seeds share no long sequence."""
    words = ["river", "town", "of", "stone", "bridge", "was", "built", "by", "people", "who", "old", "west", "hill"]
    chooser = random.Random(seed)
    path.write_text(" ".join(chooser.choice(words) for _ in range(4000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text to calibrate with, and another to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    return _write_words(folder / "calibration.txt", 1), _write_words(folder / "other.txt", 2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """A finished checkpoint."""
    out = tmp_path_factory.mktemp("checkpoint") / "rtn"
    result = invoke("quantize", "tiny", "--recipe", "rtn", "--data", texts[0], "--out", out, *WINDOWS)
    assert result.exit_code == 0, result.output
    return out
