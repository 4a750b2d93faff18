"""Claims, table and pictures of the weight-only family from made-up runs."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from accuracy_runs import load, rows


@pytest.fixture(scope="module")
def weights() -> ModuleType:
    return load("weights")


@pytest.fixture
def runs() -> dict[str, Any]:
    errors = {"sites": {"output_error": 0.1, "worst_error": 0.9, "worst_error_start": 1.0}}
    return {
        "rows": [
            *rows("gptq W3", "gptq", "ref", [0.2, 0.3], sites={"output_error": 0.2}, linear_bits_per_parameter=3.1),
            *rows("dmmv W3", "dmmv", "ref", [0.1, 0.12], **errors, linear_bits_per_parameter=3.1),
            *rows("spqr W3 + 0.5 %", "spqr", "ref", [0.05, 0.05], linear_bits_per_parameter=3.95),
            *rows("gptq W4", "gptq", "ref", [0.06, 0.06], linear_bits_per_parameter=4.0),
            *rows("gptq W3", "gptq", "tiny", [0.7], linear_bits_per_parameter=3.2),
        ],
        "machine": {"device": "GPU"},
        "protocol": {"calibration": "some text", "evaluation": "other text"},
        "command": "python benchmarks/accuracy.py",
        "order": ["gptq W4", "gptq W3", "spqr W3 + 0.5 %", "dmmv W3"],
    }


def test_claims_are_judged_on_every_model(weights: ModuleType, runs: dict[str, Any]) -> None:
    lines = weights.orders(runs).splitlines()
    assert lines[0].count("|") == 2 + 3 * 2
    missing = " | not measured" * 4
    assert f"| dmmv W3 <= gptq W3 | holds (0.44x) | holds (0.44x){missing} |" in lines
    assert f"| spqr W3 + 0.5 % <= gptq W4 | holds (0.83x) | holds (0.83x){missing} |" in lines


def test_layers_are_judged_by_their_own_figures(weights: ModuleType, runs: dict[str, Any]) -> None:
    lines = weights.layers(runs).splitlines()
    missing = " | not measured" * 2
    assert f"| dmmv W3 <= gptq W3 | holds (0.50x){missing} |" in lines
    worst = "dmmv W3: worst token <= its start, gptq W3: worst token x 0.92"
    assert f"| {worst} | holds (0.90x){missing} |" in lines
    assert f"| stored bits of spqr W3 + 0.5 % <= 4.0 | holds (0.99x){missing} |" in lines


def test_nearness_to_the_float_model_is_a_bound_on_d(weights: ModuleType) -> None:
    made = rows(weights.NEAR_LOSSLESS, "spqr", "ref", [0.009, 0.0095])
    assert f"| {weights.NEAR_LOSSLESS} <= 1 % of perplexity | holds (0.93x)" in weights.orders({"rows": made})


def test_table_is_sorted_by_bits_and_shows_the_front(weights: ModuleType, runs: dict[str, Any]) -> None:
    lines = weights.pareto(runs).splitlines()
    assert lines[0] == "| recipe | bits, ref | D, ref | bits, tiny | D, tiny |"
    assert lines[2:6] == [
        "| dmmv W3 | 3.10 | **0.1100 ± 0.0100** | - | - |",
        "| gptq W3 | 3.10 | 0.2500 ± 0.0500 | 3.20 | **0.7000** |",
        "| spqr W3 + 0.5 % | 3.95 | **0.0500 ± 0.0000** | - | - |",
        "| gptq W4 | 4.00 | 0.0600 ± 0.0000 | - | - |",
    ]
    assert "![D against stored bits, tiny](weights_tiny.png)" in lines


def test_pictures_are_stale_when_the_runs_differ(weights: ModuleType, runs: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert weights.stale_pictures(runs, tmp_path) == ["weights_ref.png", "weights_tiny.png"]
    weights.draw_pareto(runs, tmp_path)
    assert weights.stale_pictures(runs, tmp_path) == []
    runs["rows"][0]["eval"]["wikitext2_test"]["d"] = 0.25
    assert weights.stale_pictures(runs, tmp_path) == ["weights_ref.png"]


def test_document_and_pictures_are_made_and_checked_together(
    runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    render = load("render")
    for name in ("RESULTS", "PICTURES"):
        monkeypatch.setattr(render, name, tmp_path)
    monkeypatch.setattr(render, "DOCUMENT", tmp_path / "results.md")
    (tmp_path / "results.md").write_text("<!-- pareto:weights.json -->\n<!-- end -->\n")
    (tmp_path / "weights.json").write_text(json.dumps(runs))
    monkeypatch.setattr(sys, "argv", ["render.py"])
    render.main()
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    render.main()
    (tmp_path / "weights_ref.png").unlink()
    with pytest.raises(SystemExit, match="disagree"):
        render.main()


def test_every_label_that_is_judged_is_in_the_suite(weights: ModuleType) -> None:
    labels = {label for order in (*weights.ORDERS, *weights.LAYERS) for label in (order.left, order.right)}
    recipes = {weights.FIGURES.get(label, (label, ""))[0] for label in labels - set(weights.NUMBERS)}
    assert recipes <= set(load("suites").SUITES["weights"])


def test_labels_break_no_table() -> None:
    assert not any("|" in label for suite in load("suites").SUITES.values() for label in suite)
