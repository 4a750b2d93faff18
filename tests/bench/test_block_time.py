"""Times of one block: a run on the CPU, and the table with what whole models would take."""

from types import ModuleType
from typing import Any

import pytest
import torch

from accuracy_runs import load
from mergequant.calibration import StorePolicy


@pytest.fixture(scope="module")
def block_time() -> ModuleType:
    return load("block_time")


def test_block_is_timed_from_the_first_token_to_the_last_step(block_time: ModuleType, cpu: torch.device) -> None:
    model = block_time.model_of(block_time.WARM_UP, cpu)
    row = block_time.measure(model, "gptq", 4, 32, cpu, StorePolicy(cpu))
    assert 0 < row["seconds"] < row["total_seconds"]
    assert 0 < row["seconds_by_step"]["round"] <= row["seconds"] + 0.01  # rounded
    assert 4 < row["linear_bits_per_parameter"] < 4.5


def test_embeddings_are_correlated_and_span_all_channels(block_time: ModuleType) -> None:
    x = block_time.correlated(128, 64).double()
    sizes = x.square().mean(0).sqrt()
    assert sizes[:: 64 // block_time.STRONG_CHANNELS].min() > 5 * sizes.median()
    values = torch.linalg.eigvalsh(x.t() @ x)
    assert values[0] > 0
    assert values[-1] > 20 * values[32]


def test_every_recipe_with_a_goal_comes_first(block_time: ModuleType) -> None:
    weights = load("weights")
    assert set(block_time.FIRST) == set(weights.SECONDS)
    assert (block_time.SMALL, block_time.LARGE) == (weights.SMALL, weights.LARGE)


def _row(shape: str, recipe: str, seconds: float) -> dict[str, Any]:
    figures = {"seconds": seconds, "linear_bits_per_parameter": 4.01, "peak_memory_bytes": 2.5e9}
    return {"shape": shape, "recipe": recipe, **figures}


def test_table_scales_by_the_growth_that_was_measured() -> None:
    run = {
        "rows": [
            _row("llama-2-7b", "gptq", 9.0),
            _row("llama-2-7b", "vptq", 75.0),
            _row("llama-2-70b-layer", "gptq", 36.0),
        ],
        "protocol": "2 windows",
        "command": "python benchmarks/block_time.py",
        "device": {"name": "a GPU"},
        "versions": {"torch": "2"},
    }
    lines = load("weights").times(run).splitlines()
    assert lines[2:4] == [
        "| gptq | 9.0 (met) | 10 | 4.01 | 2.5 | 5 min | 36.0 | 48 min |",
        "| vptq | 75.0 (missed) | 60 | 4.01 | 2.5 | 40 min | about 300 | about 6.7 h |",
    ]
    assert "(gptq 4.0x)" in lines[-1]
