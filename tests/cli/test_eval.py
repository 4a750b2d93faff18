import json
from pathlib import Path
from typing import Any

import pytest

from mergequant.assets import TINY

WINDOWS = ["--samples", "2", "--seqlen", "32"]


def test_eval_against_float_prints_and_writes_both(
    run: Any, checkpoint: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    result = run(
        "eval", checkpoint, "--against", "tiny", "--data", texts[1], *WINDOWS, "--stride", "16", "--json", report
    )
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "stride 16" in " ".join(result.stdout.split())
    written = json.loads(report.read_text())
    assert written["quantized"]["bits_per_parameter"] < written["float"]["bits_per_parameter"] == 16
    assert written["kl_mean"] > 0
    assert 0 < written["top1_agreement"] <= 1
    assert written["protocol"]["bos"] is True
    assert list(tmp_path.iterdir()) == [report]


def test_eval_through_a_quantized_cache_says_so_and_costs_something(
    run: Any, checkpoint: Path, texts: tuple[Path, Path]
) -> None:
    nll = []
    for bits in ("16", "8", "4"):
        result = run("eval", checkpoint, "--data", texts[1], *WINDOWS, "--kv", bits)
        assert result.exit_code == 0, result.output
        assert (f"{bits}-bit keys and values" in " ".join(result.stdout.split())) == (bits != "16")
        written = json.loads(run("eval", checkpoint, "--data", texts[1], *WINDOWS, "--kv", bits, "--json", "-").stdout)
        assert written["protocol"]["kv_bits"] == int(bits)
        nll.append(written["quantized"]["nll"])
    assert len(set(nll)) == 3
    assert abs(nll[1] - nll[0]) < 0.05
    assert abs(nll[2] - nll[0]) < 0.5


def test_eval_json_to_stdout_is_deterministic(run: Any, texts: tuple[Path, Path]) -> None:
    arguments = ["eval", TINY, "--data", texts[1], *WINDOWS, "--no-bos", "--dtype", "bfloat16", "--json", "-"]
    first, second = (json.loads(run(*arguments).stdout) for _ in range(2))
    assert first["float"]["nll"] == second["float"]["nll"]
    assert first["quantized"] is None
    assert first["protocol"]["bos"] is False
    assert first["protocol"]["dtype"] == "bfloat16"


def test_eval_on_calibration_text_exits_1(run: Any, checkpoint: Path, texts: tuple[Path, Path]) -> None:
    result = run("eval", checkpoint, "--data", texts[0], "--seqlen", "256")
    assert result.exit_code == 1
    assert "are also in the calibration data" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--data is missing"),
        (["--data", "self"], "--samples"),
        (["--data", "self", "--samples", "0"], "--samples"),
        (["--data", "self", "--samples", "1", "--seqlen", "5000"], "2048"),
        (["--data", "self", "--samples", "1", "--stride", "0"], "--stride"),
        (["--data", "self", "--samples", "1", "--kv", "5"], "--kv"),
        (["--data", "self", "--samples", "1", "--kv", "4"], "no steps for a quantized cache"),
        (["--data", "self", "--samples", "1", "--kv", "4", "--tasks", "copa"], "--tasks are run without"),
        (["--data", "self", "--samples", "1", "--dtype", "float23"], "did you mean 'float32'?"),
        (["--data", "self", "--samples", "1", "--device", "cuba"], "did you mean 'cuda'?"),
        (["--data", "self", "--samples", "1", "--task-data", "nowhere"], "--task-data"),
        (["--data", "self", "--samples", "1", "--agianst", "tiny"], "--against"),
    ],
)
def test_eval_wrong_use_exits_2(run: Any, arguments: list[str], words: str) -> None:
    result = run("eval", "tiny", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_eval_of_missing_folder_exits_1_and_suggests(run: Any, checkpoint: Path) -> None:
    result = run("eval", f"{checkpoint}x", "--data", "self", "--samples", "1")
    assert result.exit_code == 1
    assert str(checkpoint) in result.stderr
