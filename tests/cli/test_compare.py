import json
from pathlib import Path
from typing import Any

import pytest

import mergequant

WINDOWS = ["--samples", "2", "--seqlen", "32", "--eval-samples", "2"]


def test_compare_prints_table_and_json_and_is_cached(run: Any, texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("recipe: rtn\nactivation_bits: 8\n", encoding="utf-8")
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["compare", "tiny", "--recipes", f"rtn:clip=true,weight_bits=8,{recipe}", "--data", texts[0]]
    arguments += ["--eval", texts[1], "--seeds", "2", "--out", out, *WINDOWS]
    result = run(*arguments, "--json", report)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for words in ("float", "linear bits", "table.md", "results.json", "2 calibration seeds"):
        assert words in shown
    written = json.loads(report.read_text())
    assert [row["recipe"] for row in written["rows"]] == ["rtn:clip=true,weight_bits=8", str(recipe)]
    assert [row["activation_bits"] for row in written["rows"]] == [4, 8]
    again = run(*arguments, "--json", "-")
    assert "quantizing" not in again.stderr
    assert len(again.stdout.splitlines()) == 1
    assert json.loads(again.stdout)["rows"] == written["rows"]


def test_compare_interrupted_says_how_to_go_on(
    run: Any, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(mergequant, "compare", interrupted)
    result = run("compare", "tiny", "--recipes", "rtn", "--eval", texts[1], "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "what is done is kept in" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipes", "rtn"], "--eval"),
        (["--eval", "TEXT"], "--recipes"),
        (["--recipes", "rtm", "--eval", "TEXT"], "did you mean 'rtn'"),
        (["--recipes", "rtn:weight_bit=4", "--eval", "TEXT"], "did you mean 'weight_bits'"),
        (["--recipes", "rtn,clip=true", "--eval", "TEXT"], "write rtn:clip=true"),
        (["--recipes", "rtn", "--eval", "TEXT", "--eval", "TEXT"], "twice"),
        (["--recipes", "rtn", "--eval", "TEXT", "--data", "TEXT"], "both calibration and evaluation"),
        (["--recipes", "rtn", "--eval", "TEXT", "--seeds", "0"], "--seeds"),
        (["--recipes", "rtn", "--eval", "TEXT", "--kv", "3"], "--kv"),
        (["--recipes", "rtn", "--eval", "TEXT", "--device", "cuba"], "did you mean 'cuda'?"),
        (["--recipes", "rtn", "--eval", "TEXT", "--seqlen", "5000"], "2048"),
        (["--recipe", "rtn", "--eval", "TEXT"], "--recipes"),
    ],
)
def test_compare_wrong_use_exits_2(
    run: Any, texts: tuple[Path, Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    given = [texts[1] if word == "TEXT" else word for word in arguments]
    result = run("compare", "tiny", *given, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_compare_of_missing_text_exits_1_and_suggests(run: Any, texts: tuple[Path, Path], tmp_path: Path) -> None:
    missing = texts[1].with_name("othr.txt")
    result = run("compare", "tiny", "--recipes", "rtn", "--eval", missing, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "other.txt" in result.stderr
