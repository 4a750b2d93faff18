"""A run that is killed goes on where it was and ends in the very same bytes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mergequant
from families import make_model, save_model
from mergequant.errors import CheckpointError, UsageError
from mergequant.pipeline import run as pipeline_run

KILLER = Path(__file__).with_name("killed_runs.py")
ROUNDED = "mergequant.steps.rounding.replace_modules"
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    # The prefix's values are scaled together with the value projection, and the run must find them so again.
    "static": ("mergequant", {"other": "static", "other_bits": 8, "prefix": "bos", "clip": "activation"}),
    "low_rank": ("mergequant", {"compensation": "low_rank", "low_rank.epochs": 1, "clip": "activation"}),
    # Blocks that are done are read back as they are, those that follow are transformed as before.
    "rotated": ("quarot", {"prefix": "bos"}),
    "learned": ("qllm", {"epochs": 1, "expansion": 0.1}),
}
PLACES: dict[str, tuple[str, str, int, int]] = {
    # label: recipe, what is called, for the how many-th time, blocks that are done by then
    "middle_of_first_block": ("static", ROUNDED, 3, 0),
    "middle_of_second_block": ("static", ROUNDED, 6, 1),
    "middle_of_second_block_low_rank": ("low_rank", ROUNDED, 5, 1),
    "tensors_of_second_block": ("static", "mergequant.checkpoint.writer.write_tensors", 2, 1),
    "record_of_second_block": ("static", "mergequant.checkpoint.writer.write_json", 3, 1),
    "middle_of_second_block_rotated": ("rotated", ROUNDED, 6, 1),
    "middle_of_second_block_learned": ("learned", ROUNDED, 6, 1),
    "tail_rotated": ("rotated", "mergequant.checkpoint.writer.write_tensors", 3, 2),
    "between_blocks": ("static", "mergequant.pipeline.run.Silent.block", 1, 1),
    "tail": ("static", "mergequant.checkpoint.writer.write_tensors", 3, 2),
    "config": ("static", "mergequant.checkpoint.writer.write_json", 4, 2),
    "verify": ("static", "mergequant.pipeline.run.verify_checkpoint", 1, 2),
    "publish": ("static", "mergequant.checkpoint.writer.CheckpointWriter._publish", 1, 2),
    "tidying_up": ("static", "mergequant.checkpoint.writer.CheckpointWriter._empty_partial", 2, 2),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its windows, and for every place a folder with what a run left that was killed there."""
    arena = tmp_path_factory.mktemp("arena")
    save_model("llama", arena / "model")
    tokens = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = 1
    jobs = []
    for label, (recipe, place, call, _) in PLACES.items():
        (arena / label).mkdir()
        name, settings = RECIPES[recipe]
        job = {"model": str(arena / "model"), "data": tokens.tolist(), "samples": 4, "out": str(arena / label / "out")}
        jobs.append({**job, "recipe": name, "settings": settings, "place": place, "call": call})
    (arena / "jobs.json").write_text(json.dumps(jobs))
    ended = subprocess.run([sys.executable, KILLER, arena / "jobs.json"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [-signal.SIGKILL] * len(jobs), ended.stderr
    for recipe in RECIPES:
        start(arena, recipe, arena / "whole" / recipe / "out")
    return arena


def start(arena: Path, recipe: str, out: Path, **options: Any) -> mergequant.Quantized:
    name, settings = RECIPES[recipe]
    tokens = torch.tensor(json.loads((arena / "jobs.json").read_text())[0]["data"])
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"settings": settings, "data": tokens, "samples": 4, "seqlen": 24, **options}
    return mergequant.quantize(arena / "model", name, out=out, **options)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks that were quantized (and not read back) since the test began."""
    names: list[str] = []
    real = pipeline_run.quantize_block

    def counted(context: Any, recipe: Any, clock: Any) -> None:
        names.append(context.name)
        real(context, recipe, clock)

    monkeypatch.setattr(pipeline_run, "quantize_block", counted)
    return names


@pytest.mark.parametrize("place", PLACES)
def test_quantize_when_killed_goes_on_and_gives_the_same_bytes(place: str, arena: Path, made: list[str]) -> None:
    recipe, _, _, done = PLACES[place]
    out = arena / place / "out"
    assert (out / "config.json").exists() == (place == "tidying_up")
    assert not (out.with_name("out.partial") / "config.json").exists()
    start(arena, recipe, out)
    assert made == ["model.layers.0", "model.layers.1"][done:]
    assert contents(out) == contents(arena / "whole" / recipe / "out")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.fixture
def killed(arena: Path, tmp_path: Path) -> Path:
    """`out` of a run with the recipe "static" whose first block is done."""
    stopped = _StopAfter(1)
    with pytest.raises(_StoppedError):
        start(arena, "static", tmp_path / "out", reporter=stopped)
    assert (tmp_path / "out.partial" / "block-00000.json").exists()
    return tmp_path / "out"


class _StoppedError(Exception):
    """The reporter's own."""


class _StopAfter:
    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def phase(self, text: str) -> None:
        pass

    def progress(self, text: str) -> None:
        pass

    def block(self, index: int, total: int, name: str, figures: Any) -> None:
        if index == self.blocks:
            raise _StoppedError


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"settings": {**RECIPES["static"][1], "ridge": 0.2}}, {"samples": 3}, {"resume": False}],
    ids=["seed", "recipe", "data", "no_resume"],
)
def test_quantize_when_run_is_another_starts_anew(
    change: dict[str, Any], arena: Path, killed: Path, tmp_path: Path, made: list[str]
) -> None:
    start(arena, "static", killed, **change)
    assert len(made) == 2
    (tmp_path / "fresh").mkdir()
    start(arena, "static", tmp_path / "fresh" / "out", **change)
    assert contents(killed) == contents(tmp_path / "fresh" / "out")


def test_quantize_when_a_done_block_is_damaged_makes_it_again(arena: Path, killed: Path, made: list[str]) -> None:
    path = killed.with_name("out.partial") / "block-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    start(arena, "static", killed)
    assert len(made) == 2
    assert contents(killed) == contents(arena / "whole" / "static" / "out")


def test_quantize_when_finished_returns_without_work(arena: Path, tmp_path: Path, made: list[str]) -> None:
    first = start(arena, "static", tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    made.clear()
    second = start(arena, "static", tmp_path / "out")
    assert not made
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    timings = ("seconds", "seconds_by_step")
    same = [{key: value for key, value in each.figures.items() if key not in timings} for each in (first, second)]
    assert same[0] == same[1]


def test_quantize_when_finished_checkpoint_is_truncated_is_an_error(arena: Path, tmp_path: Path) -> None:
    start(arena, "static", tmp_path / "out")
    shard = tmp_path / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        start(arena, "static", tmp_path / "out")


def test_quantize_when_out_holds_another_run_is_refused_unless_told(arena: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(arena, "static", out)
    before = contents(out)
    with pytest.raises(UsageError, match="--no-resume"):
        start(arena, "static", out, seed=1)
    assert contents(out) == before
    start(arena, "static", out, seed=1, resume=False)
    assert contents(out) != before


def test_quantize_twice_in_memory_gives_equal_checkpoints(arena: Path, tmp_path: Path) -> None:
    model = make_model("llama")
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tokens = torch.tensor(json.loads((arena / "jobs.json").read_text())[0]["data"])
        mergequant.quantize(model, "gptq", data=tokens, samples=4, seqlen=24, out=tmp_path / name / "out")
        results.append(contents(tmp_path / name / "out"))
    assert results[0] == results[1]
