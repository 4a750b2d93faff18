import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

import mergequant
from mergequant.cli import main
from mergequant.errors import DataError, UsageError


def test_version_from_module_prints_it() -> None:
    done = subprocess.run([sys.executable, "-m", "mergequant", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mergequant {mergequant.__version__}\n"


def test_no_command_prints_help(run: Any) -> None:
    result = run()
    assert result.exit_code == 0
    for command in ("quantize", "eval", "generate", "serve", "export", "bench", "recipes", "demo"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "serve", "export", "bench", "recipes", "demo"])
def test_help_of_command_exits_zero(run: Any, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command in result.stdout


def test_misspelt_command_suggests_near_one(run: Any) -> None:
    result = run("quantise", "tiny")
    assert result.exit_code == 2
    assert "error: unknown command 'quantise'; did you mean 'quantize'?" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "quantize, eval" not in result.stdout


@pytest.mark.parametrize(
    ("raised", "status"),
    [(UsageError("no\nway"), 2), (DataError("no\nway"), 1), (MemoryError(), 1), (RuntimeError("no\nway"), 1)],
)
def test_error_prints_one_line_and_status(monkeypatch: pytest.MonkeyPatch, raised: Exception, status: int) -> None:
    result = _failing(monkeypatch, raised)
    assert result.exit_code == status
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert ("no way" in result.stderr) == bool(str(raised))


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _failing(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert "error: interrupted" in result.stderr


def test_error_in_debug_mode_shows_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEQUANT_DEBUG", "1")
    result = _failing(monkeypatch, UsageError("no way"))
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: no way\n")


def test_main_not_standalone_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _failing(monkeypatch, UsageError("no way"), standalone_mode=False)
    assert isinstance(result.exception, UsageError)


def _failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, **extra: Any) -> Any:
    def fail() -> list[str]:
        raise error

    monkeypatch.setattr("mergequant.cli.recipes.list_recipes", fail)
    return CliRunner().invoke(main, ["recipes"], **extra)
