import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mergequant.cli.demo")  # the package's attribute of this name is the command
    for name, value in {"SAMPLES": 2, "SEQLEN": 32, "EVALUATION_WINDOWS": 2, "NEW_TOKENS": 4}.items():
        monkeypatch.setattr(module, name, value)


def test_demo_ends_with_table_of_three_models(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("demo", "--out", out, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    for words in ("float", "W4A4 per-token RTN", "mergequant-plus", "perplexity", "bits/param", "different seeds"):
        assert words in result.stdout
    assert "The history of the city" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert [*report] == ["W4A4 per-token RTN", "mergequant-plus"]
    sources = {json.dumps(row["protocol"]["windows_fingerprint"]) for row in report.values()}
    assert len(sources) == 1  # all on the same windows
    assert (out / "rtn" / "config.json").is_file()
    assert (out / "mergequant-plus" / "config.json").is_file()


def test_demo_on_own_text_evaluates_on_another_part(run: Any, texts: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["demo", "--out", tmp_path / "out", "--data", texts[0], "--recipe", "gptq", "--json", "-"]
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["gptq"]["protocol"]["overlap_checked"] is True
    again = run(*arguments)  # replaces what an earlier demo left
    assert json.loads(again.stdout)["gptq"]["kl_mean"] == json.loads(first.stdout)["gptq"]["kl_mean"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "mergequant-pls"], "did you mean 'mergequant-plus'?"),
        (["--data", "self"], "one file"),
        (["--ot", "x"], "--out"),
        (["--out", "/proc/nothing/here"], "choose another folder"),
    ],
)
def test_demo_wrong_use_exits_2(run: Any, arguments: list[str], words: str) -> None:
    result = run("demo", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
