import json
import math
from pathlib import Path

import pytest

from mergequant.cli.console import Output, Progress, human_time
from mergequant.errors import UsageError


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3727, "1:02:07")]
)
def test_human_time_rounds_to_seconds(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_json_of_infinite_value_is_null(tmp_path: Path) -> None:
    Output(str(tmp_path / "a.json")).write({"perplexity": math.inf, "rows": [(1.5, math.nan)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"perplexity": None, "rows": [[1.5, None]]}


def test_json_into_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        Output(str(tmp_path))


def test_progress_on_terminal_shows_bar_with_block_and_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress() as progress:
        progress.phase("preparing")
        progress.block(1, 4, "model.layers.0", {"output_error": 0.25})
    shown = capsys.readouterr().err
    for words in ("model.layers.0 (1 of 4)", "error 0.2500", "elapsed", "left"):
        assert words in shown
    assert progress.blocks == 1


def test_progress_elsewhere_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.phase("preparing [a]")
        progress.block(2, 2, "model.layers.1", {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("preparing [a]")
    assert lines[1].endswith("block 2 of 2, model.layers.1")
    assert len(lines) == 2
