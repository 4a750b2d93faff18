"""Memory is bounded by one block and its activations, whatever the depth of the model; activations may lie on disk."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import make_model
from mergequant.calibration import ActivationStore, StorePolicy
from mergequant.calibration import chain as chain_module
from mergequant.models import ModelShell
from mergequant.pipeline import Quantized

SCRIPT = Path(__file__).with_name("memory_run.py")
DEPTHS = (2, 24)
BLOCKS_AT_ONCE = 8  # of float32 weights: the block itself, copies that its sites work on, codes, what is being written


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or "RssAnon" not in Path("/proc/self/status").read_text(),
    reason="private memory is read from /proc/self/status",
)
def test_quantize_when_model_is_deep_needs_the_memory_of_a_shallow_one(tmp_path: Path) -> None:
    # Without the threshold, what was freed stays in the process, and fragments would be measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, tmp_path, *map(str, DEPTHS)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    shallow, deep, whole = json.loads(ended.stdout.splitlines()[-1])
    block = (deep["weights"] - shallow["weights"]) // (DEPTHS[1] - DEPTHS[0])
    growth = deep["peak"] - deep["before"]
    assert growth < BLOCKS_AT_ONCE * block < deep["weights"] / 2
    assert growth < shallow["peak"] - shallow["before"] + 3 * block
    assert whole["peak"] - whole["before"] > 1.8 * deep["weights"]  # the measure sees a model that is held (in float64)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("mergequant", {}),
        ("mergequant", {"compensation": "low_rank", "low_rank.epochs": 1}),
        ("mergequant-plus", {"tile": 8, "prefix": "auto"}),
    ],
)
def test_block_when_released_is_held_by_nothing(
    recipe: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, run: Callable[..., Quantized]
) -> None:
    """Not even by a cycle: the collector counts objects, not gigabytes, and would come too late."""
    blocks: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    load, release = ModelShell.load_block, ModelShell.release_block

    def watched_load(shell: ModelShell, index: int, **options: bool) -> nn.Module:
        block = load(shell, index, **options)
        blocks.append(weakref.ref(block))
        return block

    def watched_release(shell: ModelShell, index: int) -> None:
        release(shell, index)
        alive.append(sum(block() is not None for block in blocks))

    monkeypatch.setattr(ModelShell, "load_block", watched_load)
    monkeypatch.setattr(ModelShell, "release_block", watched_release)
    run(make_model("llama"), recipe, settings=settings)
    assert len(blocks) >= 4  # quantized and verified
    assert set(alive) == {0}


@pytest.mark.parametrize("recipe", ["mergequant-w4a8", "gptq"])
def test_quantize_when_activations_spill_to_disk_gives_the_same_bytes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Quantized]
) -> None:
    monkeypatch.setattr(chain_module, "TOKENS_PER_CHUNK", 48)  # several chunks
    model = make_model("qwen2")
    spilled: list[Path] = []
    place = ActivationStore._place

    def watched(store: ActivationStore, value: Tensor, position: int) -> Tensor | Path:
        placed = place(store, value, position)
        if isinstance(placed, Path):
            spilled.append(placed)
        return placed

    monkeypatch.setattr(ActivationStore, "_place", watched)
    (tmp_path / "spill").mkdir()
    files = []
    for number, room in enumerate((1 << 30, 2 * 48 * 40 * 4, 0)):  # all, two chunks, none in memory
        policy = StorePolicy(torch.device("cpu"), memory_bytes=room, folder=tmp_path / "spill")
        done = run(model, recipe, tmp_path / str(number), policy=policy)
        assert bool(spilled) == bool(number)
        files.append((done.folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    assert not list((tmp_path / "spill").iterdir())
