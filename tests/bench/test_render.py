"""Tables of docs/results.md from a report of the bench."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mergequant.bench import BenchReport, Ceilings, Rate, Row

CEILINGS = Ceilings(4.557, {8: 2.3, 45: 3.83}, 1.0, {"int8": Rate(1940, 1850), "bf16": Rate(742, 661)})
ROWS = [
    *(
        Row("gemm", "w4a8", 2048, ms=0.24, tops=tops, gb_s=190, vs_bf16=2.2, vs_fp8=1.2, what=layer, mode="sustained")
        for layer, tops in (("qkv", 1480.0), ("o", 1620.0))
    ),
    Row("gemm", "w8a8", 2048, ms=0.25, tops=1400, gb_s=380, vs_bf16=2.0, what="o", mode="sustained"),
    Row(
        "prefill", "w4a8", 1, 2048, 4, ms=20.9, tops=1270, vs_bf16=2.16, vs_fp8=1.3, percent_of_ceiling=74.6,
        spread=0.01,
    ),
    Row("decode", "w4a8", 1, 2048, 8, ms=1.57, gb_s=2580, vs_bf16=2.85, vs_fp8=2.45, spread=0.01),
    Row("decode", "w4a8", 1, 2048, 4, ms=1.55, gb_s=2430, vs_bf16=2.91, vs_fp8=2.49, spread=0.01),
    Row("decode", "w4a8", 1, 2048, 16, ms=1.89, gb_s=2430, vs_bf16=9.0, vs_fp8=9.0, spread=0.01),
    Row("e2e", "w4a8", 16, 1024, 4, ms=1000.0, vs_bf16=2.0, new_tokens=256, spread=0.01),
    Row("memory", "w4a8", gb=3.82, vs_bf16=3.53, what="weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def render() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as for a script, which finds its neighbours
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run() -> dict[str, Any]:
    state = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "watts": 110.0, "celsius": 33.0}
    device = {"name": "NVIDIA H200", "power_limit_watts": 700.0, "clocks": {"before": state, "after": None}}
    versions = {"torch": "2.11.0", "triton": None}
    report = BenchReport(device, versions, {"name": "llama-2-7b"}, CEILINGS, ROWS, ["a note"], "mergequant bench", 12)
    return dict(json.loads(json.dumps(report.to_dict())))


def test_goals_judge_products_by_the_slowest_layer_and_caches_by_the_better(
    render: ModuleType, run: dict[str, Any]
) -> None:
    text = render.speed_goals(run)
    assert "| 1,300 | 1,500 | 1,650 | 1,480 to 1,620 (accept) |" in text
    assert "| decode 1 x 2048, kv8 or kv4, against bf16 | 2.5 | 2.9 | 3.7 | 2.91 (target) |" in text
    assert "| end to end 16 x (1024 + 256), kv4, against bf16 | 2.1 | 2.5 | 2.9 | 2 (missed) |" in text
    assert "| decode 64 x 2048, kv4, against bf16 | 2.5 | 3 | 3.4 | not measured |" in text


def test_tables_hold_the_figures(render: ModuleType, run: dict[str, Any]) -> None:
    made = {kind: make(run) for kind, make in render.MAKERS.items() if kind in PARTS}
    for kind, words in PARTS.items():
        for word in words:
            assert word in made[kind], (kind, word)
        rows = [line for line in made[kind].splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1, kind


PARTS = {
    "ceilings": [
        "| read, several GB, TB/s | 4.557 |",
        "2.30 at 8 MB",
        "before 1980 MHz, 110 W",
        "torch 2.11.0",
        "12 s",
    ],
    "prefill": ["| 1 x 2048 | w4a8 kv4 | 20.9 | 1,270 | 2.16x | 1.30x | 75% | 1.0% |"],
    "decode": ["| 1 x 2048 | w4a8 kv8 | 1.57 | 2,580 | 2.85x | 2.45x | - | 1.0% |"],
    "e2e": ["| 16 x 1024 + 256 | w4a8 kv4 | 1,000 | 4,096 |"],
    "gemm": ["| o | 2048 | sustained | 240 | 1,620 | 190 | - | 2.20x | 1.20x | 2.00x | - |", "| qkv |"],
    "memory": ["| weights | w4a8 | 3.82 | 3.53x | - |"],
    "notes": ["- a note"],
}


def test_bound_of_a_prefill_comes_from_the_rates_of_the_run(render: ModuleType, run: dict[str, Any]) -> None:
    run["shape"] |= {"layers": 32, "heads": 32, "head_width": 128}
    lines = render.bound(run).splitlines()
    products, attention = 1270e12 * 20.9e-3, 2 * 2048**2 * 4096 * 32
    floats, integers = ((products / rate + attention / 661e12) * 1e3 for rate in (661e12, 1850e12))
    assert f"| the ceilings, sustained | {floats:.4g} | {integers:.4g} | {floats / integers:.2f}x |" in lines
    assert "| the whole prefill, measured | 45.14 | 20.9 | 2.16x |" in lines
    assert not any("GEMMs below" in line for line in lines)  # the run has no bf16 products
    assert "no prefill" in render.bound({**run, "rows": []})


def test_elementwise_ops_stand_by_tokens(render: ModuleType) -> None:
    times = {
        ("norm, static", 4096): 1.0,
        ("norm, dynamic, one kernel", 4096): 1.5,
        ("hadamard, static", 4096): 1.25,
        ("hadamard, dynamic", 4096): 2.0,
        ("hadamard, static", 11008): 3.0,
        ("hadamard, dynamic", 11008): 5.0,
        ("silu_mul", 11008): 0.75,
        ("static_quant", 4096): 0.5,
    }
    rows = [{"op": op, "width": wide, "tokens": n, "us": n * us} for (op, wide), us in times.items() for n in (1, 2048)]
    rows.append({"op": "norm, static", "width": 4096, "tokens": 16, "us": 1.125})
    text = render.elementwise({"device": "a GPU", "versions": {"torch": "2.11.0"}, "rows": rows})
    assert "| us, at so many tokens | 1 | 16 | 2048 |" in text
    assert "| norm, static step, 4096 | 1 | 1.125 | 2,048 |" in text
    assert "| Hadamard, step of a token, 11008 | 5 | - | 10,240 |" in text
    assert "silu_mul" not in text
    saved, rotated = 32 * (2 * 0.5 + 0.75 + 2.0) / 1e3, 32 * (1.25 + 3.0 + 0.75) / 1e3
    assert f"instead of static ones: {saved:.2f} ms at 1, {saved * 2048:.2f} ms at 2048." in text
    assert f"of its own: {rotated:.2f} ms at 1, {(rotated - 32 * 0.5 / 1e3) * 2048:.2f} ms at 2048." in text


def test_attention_shows_the_chosen_division(render: ModuleType) -> None:
    floats = {"cudnn": 14.0, "triton 8": 15.0, "triton 16": 13.0, "chosen": "triton 16", "bytes": 4}
    eight = {"8x2/8": 7.0, "4x8/8": 11.0, "chosen": "8x2/8", "bytes": 14_000_000}
    four = {"4x8/8": 6.0, "chosen": "9x9/9", "bytes": 8}
    row = {"kind": "gqa", "batch": 4, "context": 2048, "16": floats, "8": eight, "4": four}
    text = render.attention({"device": "a GPU", "torch": "2.11.0", "rows": [row]})
    assert "| gqa | 4 x 2048 | 14 | 13 | 7 | 2.00 | 2.00x | - | - | - |" in text


def test_run_that_was_not_made_is_named_as_such(
    render: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    document = "<!-- decode:bench_x.json -->\nold\n<!-- end -->\n"
    assert "Not measured yet" in render.rendered(document)
