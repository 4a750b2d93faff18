"""The table of weight-only kernels, and that ops choose what was measured to be faster."""

import importlib
import json
from typing import Any

import pytest
import torch

from accuracy_runs import BENCHMARKS, load

# Their names in `mergequant.ops` are the ops.
sparse_dense_linear, codebook_linear = (
    importlib.import_module(f"mergequant.ops.{name}") for name in ("sparse_dense_linear", "codebook_linear")
)
SPARSE = {"kernel": 20.0, "without_outliers": 18.0, "decode_then_multiply": 30.0, "bf16": 32.0, "bytes": 46_000_000}
LAYOUTS = {"v4k256": (1, 4, 8, 0), "v6k4096": (1, 6, 12, 0), "v8k256+256": (1, 8, 8, 8)}


@pytest.fixture
def run() -> dict[str, Any]:
    rows = [
        {**SPARSE, "op": op, "shape": shape, "tokens": tokens, "kernel": 20.0 + 4 * tokens * wide}
        for op in ("sparse", "v4k256")
        for wide, shape in enumerate(("o", "down"))
        for tokens in (1, 2, 4)
    ]
    for row in rows:
        if row["op"] != "sparse":
            del row["without_outliers"]
    versions = {"torch": "2", "triton": "3", "driver": "5"}
    return {"device": {"name": "a GPU"}, "versions": versions, "command": "a command", "rows": rows}


def test_table_shows_times_goals_and_where_decoding_is_faster(run: dict[str, Any]) -> None:
    lines = load("weight_speed").table(run).splitlines()
    assert "| sparse, against bf16 | 1.5x | 2.2x | 1.33x to 1.60x (missed) |" in lines
    assert "| what outliers add | +35% | - | +11% to +33% (accept) |" in lines
    assert "| sparse | 1 | 20.0 (1.60x) | 24.0 (1.33x) | +11% to +33% |" in lines
    assert "| v4k256 | 4 | 20.0 (1.60x) | 36.0 (0.89x) | - |" in lines
    assert "| v4k256, decoded first | 1 to 4 | 30 | 30 | - |" in lines
    assert "than decoding first: sparse 2, v4k256 2." in lines[-1]
    assert not any("reading alone" in line for line in lines)


def test_reading_alone_stands_there_when_its_rate_was_measured(run: dict[str, Any]) -> None:
    assert "| sparse, reading alone | - | 10.0 | 10.0 | - |" in load("weight_speed").table({**run, "read_tb_s": 4.6})


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_crossing_is_the_last_count_before_a_slower_one(run: dict[str, Any], tokens: int) -> None:
    for row in run["rows"]:
        row["kernel"] = 31.0 if row["tokens"] == tokens and row["shape"] == "down" else 20.0
    assert load("weight_speed").crossing(run, "sparse") == tokens // 2


def test_ops_take_the_kernel_as_far_as_it_was_measured_to_be_faster() -> None:
    stored = json.loads((BENCHMARKS / "results" / "weight_only.json").read_text())
    crossing = load("weight_speed").crossing
    assert sparse_dense_linear.MOST_TOKENS["cuda"] == crossing(stored, "sparse")
    assert {crossing(stored, op): kind for op, kind in LAYOUTS.items()} == {
        most: kind for kind, most in codebook_linear.MEASURED_TOKENS.items()
    }
    for op, (groups, vector, bits, residual_bits) in LAYOUTS.items():
        book = torch.empty(groups, 1, vector)
        layout = [4096, bits, residual_bits]
        assert codebook_linear.most_tokens("cuda", [book], layout) == crossing(stored, op)
        assert codebook_linear.most_tokens("cuda", [book, book], 2 * layout) == 8
        assert codebook_linear.most_tokens("triton", [book], layout) == 2
