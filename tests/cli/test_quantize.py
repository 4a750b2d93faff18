import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mergequant

WINDOWS = ["--samples", "2", "--seqlen", "32"]
COMMAND = ["quantize", "tiny", "--recipe", "rtn", *WINDOWS]


def test_quantize_writes_checkpoint_and_summary(run: Any, texts: tuple[Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    out = tmp_path / "my model"
    result = run(*COMMAND, "--data", texts[0], "--out", out, "--json", report)
    assert result.exit_code == 0, result.output
    for words in (
        "bits per parameter",
        "largest error",
        "static steps per channel for 8 and 4 bits",
        f"mergequant eval '{out}' --against tiny",
        "generate",
    ):
        assert words in result.stdout
    assert "block 6 of 6" in result.stderr
    written = json.loads(report.read_text())
    assert written["folder"] == str(out)
    assert written["recipe"]["name"] == "rtn"
    assert written["figures"]["linear_bits_per_parameter"] == pytest.approx(4.1, abs=0.1)
    assert mergequant.load(out).config.hidden_size == 256


def test_quantize_again_goes_no_second_time(run: Any, texts: tuple[Path, Path], checkpoint: Path) -> None:
    before = (checkpoint / "config.json").stat().st_mtime_ns
    result = run(*COMMAND, "--data", texts[0], "--out", checkpoint)
    assert result.exit_code == 0
    assert "was complete already" in result.stdout
    assert (checkpoint / "config.json").stat().st_mtime_ns == before


def test_quantize_over_other_checkpoint_needs_no_resume(run: Any, texts: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [*COMMAND, "--data", texts[0], "--out", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    refused = run(*arguments, "--seed", "1")
    assert refused.exit_code == 2
    assert "--no-resume" in refused.stderr
    assert run(*arguments, "--seed", "1", "--no-resume").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["seed"] == 1


def test_json_to_stdout_leaves_nothing_else_there(run: Any, tmp_path: Path) -> None:
    result = run(*COMMAND, "--no-bos", "--set", "weight_bits=8", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["figures"]["linear_bits_per_parameter"] > 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["parameters"]["weight_bits"] == 8
    assert config["quantization_config"]["provenance"]["calibration"]["source"] == "self"


def test_dry_run_prints_plan_and_writes_nothing(run: Any, tmp_path: Path) -> None:
    result = run("quantize", "tiny", "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    for words in ("6 equal blocks", "q_proj 256x256", "int8 static per channel", "peak memory", "sm_90", "embeddings"):
        assert words in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_json_tells_scheme_of_every_site(run: Any) -> None:
    result = run("quantize", "tiny", "--recipe", "gptq", "--set", "group_size=64", "--dry-run", "--json", "-")
    plan = json.loads(result.stdout)
    assert len(plan["sites"]) == 24
    assert {(site["weights"], site["inputs"]) for site in plan["sites"]} == {("int4 groups of 64, gptq", "float")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "mergequant-w4a9"], "did you mean 'mergequant-w4a8'?"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
        (["--set", "splitt=0"], "did you mean 'split'?"),
        (["--set", "clip.moode=none"], "did you mean 'mode'?"),
        (["--set", "split"], "key=value"),
        (["--set", "split=["], "not YAML"),
        (["--set", "split=many"], "'many' does not fit"),
        (["--device", "cud"], "did you mean 'cuda'?"),
        (["--device", "cpu:1"], "unknown device"),
        (["--samples", "0"], "--samples"),
        (["--samples", "many"], "--samples"),
        (["--seqlen", "1"], "--seqlen"),
        (["--seqlen", "9999"], "2048"),
        (["--seed", "-1"], "--seed"),
        (["--data", ""], "--data"),
        (["--json", "/nowhere/a.json"], "/nowhere"),
        (["--sampels", "2"], "--samples"),
        (["--recpe", "rtn"], "--recipe"),
        (["--dry-rum"], "--dry-run"),
        (["--no-resum"], "--no-resume"),
    ],
)
def test_wrong_use_exits_2_and_helps(run: Any, arguments: list[str], words: str) -> None:
    result = run("quantize", "tiny", "--recipe", "mergequant-w4a8", "--dry-run", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_quantize_without_out_exits_2(run: Any) -> None:
    result = run("quantize", "tiny")
    assert result.exit_code == 2
    assert "--out DIR is missing" in result.stderr


def test_quantize_of_missing_things_exits_1_and_suggests(run: Any, checkpoint: Path, texts: tuple[Path, Path]) -> None:
    result = run("quantize", f"{checkpoint}x", "--dry-run")
    assert result.exit_code == 1
    assert f"Did you mean {checkpoint}?" in result.stderr
    result = run("quantize", "tiny", "--dry-run", "--data", texts[0].with_name("calibratio.txt"))
    assert result.exit_code == 1
    assert f"did you mean {texts[0]}?" in result.stderr


def test_quantize_of_quantized_model_exits_2(run: Any, checkpoint: Path) -> None:
    result = run("quantize", checkpoint, "--dry-run")
    assert result.exit_code == 2
    assert "quantized" in result.stderr


def test_cuda_without_gpu_exits_2(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("quantize", "tiny", "--dry-run", "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr


def test_recipe_from_yaml_file_is_used(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: rtn\nweight_bits: 8\n")
    plan = json.loads(run("quantize", "tiny", "--recipe", file, "--dry-run", "--json").stdout)
    assert {site["weights"] for site in plan["sites"]} == {"int8 per row, rtn"}


def _interrupted(arguments: list[str]) -> tuple[int, str]:
    """Exit status of a run that gets Ctrl-C in its first block, and what it wrote from there on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "mergequant", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    for line in process.stderr:
        if "block 1 of 6" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    return process.returncode, rest


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted_run_resumes_to_equal_checkpoint(run: Any, texts: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["quantize", "tiny", "--recipe", "gptq", *WINDOWS, "--data", str(texts[0]), "--out"]
    out = tmp_path / "out"
    code, rest = _interrupted([*arguments, str(out)])
    assert code == 130
    assert "goes on after them" in rest
    assert "Traceback" not in rest
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    result = run(*arguments, out)
    assert result.exit_code == 0, result.output
    assert run(*arguments, tmp_path / "other").exit_code == 0
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()
