"""compare(): caching, going on after a kill, refused recipes, and what stops all of it."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergequant
from mergequant.comparison import Comparison, cell
from mergequant.comparison import run as runs
from mergequant.comparison.memory import peak_memory
from mergequant.errors import CheckpointError, DataError, OverlapError, RecipeError, StructureError, UsageError
from mergequant.recipes import get_recipe

Compare = Callable[..., Comparison]

KILLED = """
import json, os, signal, sys
import torch
import mergequant
from mergequant.comparison import cell, run

torch.set_num_threads(1)
real, count = cell.run_cell, [0]

def deadly(*args):
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

run.run_cell = deadly
run.code_digest = lambda: sys.argv[2]
if __name__ == "__main__":
    mergequant.compare(**json.loads(sys.argv[1]))
"""


def _figures(report: Comparison) -> list[Any]:
    """All that does not depend on how fast a run was."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes")} for row in report.rows()]


def _forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"one of {names} was called")

    for name in names:
        monkeypatch.setattr(cell, name, called)


def test_second_run_takes_everything_from_the_folder(
    run: Compare, finished: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid(monkeypatch, "quantize", "evaluate", "load_model")
    again = run(out=finished.folder)
    assert again.rows() == finished.rows()
    assert again.float_ == finished.float_


def test_other_windows_take_the_checkpoints_and_measure_anew(
    run: Compare, finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid(monkeypatch, "quantize")
    other = run(out=finished.folder, windows=3, seeds=[1])
    assert other.protocol["evaluation"]["first"]["samples"] == 3
    assert [row["seeds"] for row in other.rows()] == [[1], [1]]
    assert [row["seconds"] for row in other.rows()] == [
        found["seconds"] for found in sorted(finished.cells, key=lambda c: c["recipe"] != "rtn") if found["seed"] == 1
    ]
    run(out=finished.folder)  # leaves the tables as the other tests know them


def test_other_text_of_calibration_is_another_checkpoint(run: Compare, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    for word in ("summer", "winter"):
        text.write_text(" ".join(f"{word} {number}" for number in range(600)), encoding="utf-8")
        run("rtn", tmp_path / "out", data=text, seeds=1, windows=1)
    assert len(list((tmp_path / "out" / "checkpoints").glob("rtn-*-s0"))) == 2


@pytest.mark.slow
def test_killed_run_goes_on_with_what_is_done(
    run: Compare, finished: Comparison, model: Path, options: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED, encoding="utf-8")
    arguments = {**options, "model": model, "recipes": "rtn,gptq:activation_bits=4", "out": out}
    ended = subprocess.run(
        [sys.executable, script, json.dumps(arguments, default=str), runs.code_digest()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 2  # both recipes, of the first seed
    assert len([path for path in (out / "cells").iterdir() if "-s" in path.name]) == 2
    quantized = []
    real = cell.quantize
    monkeypatch.setattr(
        cell, "quantize", lambda *args, **kwargs: (quantized.append(kwargs["seed"]), real(*args, **kwargs))[1]
    )
    assert _figures(run(out=out)) == _figures(finished)
    assert quantized == [1, 1]


def test_broken_record_is_made_anew(run: Compare, tmp_path: Path) -> None:
    first = run("rtn", tmp_path, seeds=1, windows=1)
    (record,) = (tmp_path / "cells").glob("rtn-*")
    record.write_text(record.read_text()[:100])
    assert run("rtn", tmp_path, seeds=1, windows=1).rows() == first.rows()


def test_refused_recipe_is_a_row_with_its_reason_and_tried_once(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seeds = cell.quantize, []

    def quantize(model: Any, recipe: Any, **kwargs: Any) -> Any:
        if recipe.name == "gptq":
            seeds.append(kwargs["seed"])
            raise StructureError("block 0: no site of\nthis kind; `rtn` works")
        return real(model, recipe, **kwargs)

    monkeypatch.setattr(cell, "quantize", quantize)
    report = run("gptq,rtn", tmp_path, windows=1)
    refused, served = report.rows()
    assert refused["reason"] == "block 0: no site of this kind; `rtn` works"
    assert refused["nll_increase"] is None
    assert served["reason"] is None
    assert served["seeds"] == [0, 1]
    assert seeds == [0]
    monkeypatch.setattr(cell, "quantize", real)
    assert [row["reason"] for row in run("gptq,rtn", tmp_path, windows=1).rows()] == [None, None]


def test_fault_of_one_recipe_costs_the_others_nothing(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cell.quantize

    def quantize(model: Any, recipe: Any, **kwargs: Any) -> Any:
        if recipe.name == "gptq" and kwargs["seed"] == 1:
            raise IndexError("row 7")
        return real(model, recipe, **kwargs)

    monkeypatch.setattr(cell, "quantize", quantize)
    failed, served = run("gptq,rtn", tmp_path, windows=1).rows()
    assert "please report it: IndexError: row 7" in failed["reason"]
    assert failed["seeds"] == [0]
    assert served["seeds"] == [0, 1]
    (trace,) = (tmp_path / "cells").glob("*.traceback.txt")
    assert "Traceback" in trace.read_text()
    assert str(trace) in failed["reason"]
    monkeypatch.setattr(cell, "quantize", real)
    assert [row["seeds"] for row in run("gptq,rtn", tmp_path, windows=1).rows()] == [[0, 1], [0, 1]]
    assert not list((tmp_path / "cells").glob("*.traceback.txt"))


def test_process_that_dies_is_a_row_with_its_reason(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work_off(groups: Any, workers: int, work: Any, lost: Any, environments: Any) -> Any:
        yield from (lost(job, "was ended by SIGKILL") for group in groups for job in group)

    monkeypatch.setattr(runs, "work_off", work_off)
    (row,) = run("rtn", tmp_path, workers=2, windows=1).rows()
    assert "SIGKILL" in row["reason"]
    assert "--workers" in row["reason"]


def test_full_disk_stops_the_run_and_keeps_what_is_done(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.fsync, [0]

    def fsync(handle: int) -> None:
        count[0] += 1
        if count[0] > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"the disk is full.*then run the same command again"):
        run("rtn,gptq:activation_bits=4", tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    done = len(list((tmp_path / "cells").glob("*-s?-*.json")))
    assert 0 < done < 4
    assert len(run("rtn,gptq:activation_bits=4", tmp_path).cells) == 4


def test_real_refusal_of_a_recipe(run: Compare) -> None:
    report = run("mergequant:width=keep,other=static,other_bits=8,prefix=[1,7999999],rtn", seeds=1, windows=1)
    refused, served = report.rows()
    assert refused["reason"]
    assert served["nll_increase"] is not None


@pytest.mark.slow
def test_side_by_side_gives_the_same(run: Compare, finished: Comparison) -> None:
    recipes = {"rtn": "rtn", "gptq:activation_bits=4": get_recipe("gptq", activation_bits=4), "again": "rtn"}
    report = run(recipes, workers=2, seeds=[0, 1])
    assert report.folder is None
    ours = [{**row, "recipe": None} for row in _figures(report)]
    theirs = [{**row, "recipe": None} for row in _figures(finished)]
    assert ours == [*theirs, theirs[0]]


def test_cache_of_four_bits_is_measured(run: Compare, finished: Comparison) -> None:
    report = run("rtn", finished.folder, kv_bits=4)
    assert report.rows()[0]["nll_increase"] != finished.rows()[0]["nll_increase"]
    assert report.protocol["kv_bits"] == 4
    run(out=finished.folder)


def test_overlap_of_texts_stops_the_run(run: Compare, texts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both calibration and evaluation"):
        run("rtn", evaluation=texts[0])
    copy = tmp_path / "copy.txt"
    copy.write_text(texts[0].read_text(), encoding="utf-8")
    with pytest.raises(OverlapError, match="calibration"):
        run("rtn", evaluation=copy, windows=None, samples=40, seqlen=48)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"recipes": "rtn,gtpq"}, RecipeError, "did you mean 'gptq'"),
        ({"recipes": []}, UsageError, "none given"),
        ({"recipes": ["rtn", get_recipe("rtn")]}, UsageError, "twice"),
        ({"seeds": 0}, UsageError, "--seeds"),
        ({"seeds": [-1]}, UsageError, "--seeds"),
        ({"workers": 0}, UsageError, "--workers"),
        ({"kv_bits": 5}, UsageError, "--kv 5"),
        ({"kv_bits": 4, "tasks": "copa"}, UsageError, "leave out --kv 4"),
        ({"seqlen": 129}, UsageError, "128"),
        ({"evaluation": {}}, UsageError, "no text"),
        ({"evaluation": ["too short"]}, DataError, "too short"),
        ({"samples": 100_000}, DataError, "too short"),
    ],
)
def test_what_concerns_all_recipes_raises(
    run: Compare, more: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(**{"recipes": "rtn", **more})


def test_seeds_and_recipes_may_be_named(run: Compare) -> None:
    report = run(["rtn:clip=true", get_recipe("rtn")], seeds=[3], windows=1)
    assert [(row["recipe"], row["seeds"]) for row in report.rows()] == [("rtn:clip=true", [3]), ("rtn", [3])]
    assert report.rows()[0]["parameters"]["clip"] is True


def test_tasks_are_run_on_the_float_model_once_and_on_every_cell(run: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_tasks(models: Any, tokenizer: Any, tasks: Any, **options: Any) -> Any:
        asked.append((tuple(tasks), options))
        own = {"accuracy": 0.5 + len(asked) / 100, "standard_error": 0.1, "metrics": {}}
        return {
            "copa": {"metric": "acc", "samples": 4, "chance": 0.5, "bos": True, "models": dict.fromkeys(models, own)}
        }

    monkeypatch.setattr(cell, "run_tasks", run_tasks)
    monkeypatch.setattr(runs, "require_lm_eval", lambda: None)
    report = run("rtn", tasks="copa", task_samples=4, task_data="x")
    assert asked == [(("copa",), {"task_data": Path("x"), "limit": 4})] * 3
    assert report.float_["tasks"]["copa"]["accuracy"] == 0.51
    (row,) = report.rows()
    assert row["tasks"]["copa"]["accuracy"] == pytest.approx(0.525)
    assert row["tasks"]["copa"]["standard_error"] == pytest.approx(0.1)
    assert "0.525 ± 0.100" in report.markdown()


def test_peak_memory_sees_what_was_held_inside() -> None:
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        torch.ones(50_000_000, dtype=torch.float32)
    if small.bytes is None or large.bytes is None:
        pytest.skip("this system does not tell")
    assert large.bytes - small.bytes > 150_000_000


def test_compare_is_public() -> None:
    assert mergequant.compare is runs.compare
