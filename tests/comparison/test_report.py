"""The table: schema of the JSON, Markdown, CSV, picture, and what stands in a row of a recipe that was refused."""

import csv
import importlib.util
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mergequant
from mergequant.comparison import Comparison
from mergequant.comparison.papers import PAPER_COLUMNS, paper_lines
from mergequant.comparison.picture import Point, pareto_front, picture
from mergequant.recipes import Figure, get_recipe

PNG = b"\x89PNG"


def _found(increase: float, perplexity: float | None = 20.0) -> dict[str, Any]:
    return {"nll_increase": increase, "perplexity": perplexity, "kl_mean": 0.1, "top1_agreement": 0.9}


def _cell(recipe: str, seed: int, increase: float, **more: Any) -> dict[str, Any]:
    cell = {
        "recipe": recipe, "seed": seed, "reason": None, "seconds": 2.0, "peak_memory_bytes": 10**8 * (seed + 1),
        "bits_per_parameter": 5.0, "linear_bits_per_parameter": 4.25, "activation_bits": 8.0,
        "texts": {"wiki": _found(increase)},
        "tasks": {"piqa": {"metric": "acc", "samples": 9, "chance": 0.5, "accuracy": 0.5 + seed / 10,
                           "standard_error": 0.1}},
    }  # fmt: skip
    return cell | more


@pytest.fixture
def report() -> Comparison:
    protocol = {
        "calibration": {"data": "train.txt", "samples": 2, "seqlen": 32},
        "evaluation": {"wiki": {"samples": 2, "seqlen": 32, "bos": True}},
        "seeds": [0, 1],
        "kv_bits": 4,
    }
    task = {"accuracy": 0.7, "standard_error": 0.1}
    floats = {
        "texts": {"wiki": {"perplexity": 15.0}},
        "tasks": {"piqa": task},
        "bits_per_parameter": 16.0,
        "linear_bits_per_parameter": 16.0,
    }
    recipes = {"gptq": get_recipe("gptq"), "rtn": get_recipe("rtn")}
    cells = [_cell("rtn", 1, 0.5), {"recipe": "gptq", "seed": 0, "reason": "no | sites"}, _cell("rtn", 0, 0.25)]
    return Comparison("m", recipes, ["wiki"], protocol, {}, floats, cells)


def test_rows_hold_mean_and_spread_over_seeds(report: Comparison) -> None:
    refused, row = report.rows()
    assert row["seeds"] == [0, 1]
    assert row["nll_increase"] == pytest.approx(0.375)
    assert row["nll_increase_spread"] == pytest.approx(0.25)
    assert row["perplexity"] == pytest.approx(20)
    assert row["peak_memory_bytes"] == 2 * 10**8
    assert row["tasks"]["piqa"] == {
        "metric": "acc", "samples": 9, "chance": 0.5, "accuracy": pytest.approx(0.55),
        "standard_error": pytest.approx(0.1), "spread": pytest.approx(0.1),
    }  # fmt: skip
    assert refused["reason"] == "no | sites"
    assert refused["nll_increase"] is refused["nll_increase_spread"] is refused["seconds"] is None
    assert refused["tasks"] == refused["texts"] == {}
    assert set(refused) == set(row)


def test_overflowed_perplexity_is_null_and_a_dash(report: Comparison) -> None:
    report.cells[0]["texts"] = {"wiki": _found(800.0, None)}
    assert report.rows()[1]["perplexity"] is None
    json.dumps(report.to_dict(), allow_nan=False)
    assert "| rtn | - | 400.1250" in report.markdown()


def test_markdown_has_float_spread_reason_and_the_papers_figures(report: Comparison) -> None:
    text = report.markdown()
    assert "| float | 15.00 | 0 | 0 | 100.0% | 0.700 ± 0.100 | 16.00 | 16.00 | - | - | - |" in text
    assert "| rtn | 20.00 | 0.3750 ± 0.1250 | 0.1000 | 90.0% | 0.550 ± 0.100 | 5.00 | 4.25 | 8.0 | 2 | 200 MB |" in text
    assert "- gptq: no | sites" in text
    assert "Keys and values of 4 bits." in text
    assert "| gptq | WikiText-2 perplexity | 6.09 | 0.070 | LLaMA-7B W4, rows, act-order (float 5.68) |" in text
    for lines in text.split("\n\n"):
        counts = {line.replace(r"\|", "").count("|") for line in lines.splitlines() if line.startswith("|")}
        assert len(counts) <= 1


def test_papers_figures_stand_beside_ours_of_the_same_kind(report: Comparison) -> None:
    row = report.rows()[1]
    figures = [
        Figure("WikiText-2 perplexity", 6.0, "big, W4A4 (float 5.0)", "paper"),
        Figure("WikiText-2 perplexity", 6.0, "big, W4A4", "paper"),
        Figure("zero-shot average of 6 tasks", 65.6, "big (float 69.8)", "paper"),
        Figure("prefill speed-up", 2.0, "big", "paper"),
    ]
    lines = paper_lines(row, figures, "m, wiki")
    assert [line[3] for line in lines] == ["0.182", "-", "-", "-"]
    assert [line[6:] for line in lines] == [
        ["perplexity 20.00", "0.375", "m, wiki, W4.2A8.0"],
        ["perplexity 20.00", "0.375", "m, wiki, W4.2A8.0"],
        ["mean of piqa 55.0", "-", "m, wiki, W4.2A8.0"],
        ["-", "-", "m, wiki, W4.2A8.0"],
    ]
    assert [line[6:] for line in paper_lines(report.rows()[0], figures[:1], "m, wiki")] == [["-", "-", "m, wiki"]]
    assert len(lines[0]) == len(PAPER_COLUMNS)


def test_terminal_has_long_labels_and_tasks_in_a_table_of_their_own(report: Comparison) -> None:
    label = "gptq:activation_bits=4,activation_clip=true"
    report.cells = [{**cell, "recipe": label} for cell in report.cells if cell["recipe"] == "rtn"]
    report.recipes = {label: report.recipes["gptq"]}
    console = Console(width=100, record=True, file=io.StringIO())
    for part in report.tables():
        console.print(part)
    shown = console.export_text()
    assert re.search(r"gptq: activation_bits=4,  +20.00", shown)
    assert re.search(r"accuracy +piqa", shown)
    assert "0.550 ± 0.100" in shown


def test_csv_has_a_line_per_recipe_unrounded(report: Comparison) -> None:
    refused, row = csv.DictReader(io.StringIO(report.csv()))
    assert float(row["wiki nll_increase"]) == 0.375
    assert float(row["piqa accuracy"]) == pytest.approx(0.55)
    assert row["seeds"] == "0 1"
    assert refused["wiki nll_increase"] == refused["seconds"] == ""
    assert refused["reason"] == "no | sites"


def test_without_matplotlib_a_note_takes_the_pictures_place(
    report: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picture.png").write_bytes(b"old")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.draw(tmp_path)
    assert "pip install mergequant[plots]" in report.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.csv", "table.md"]
    assert json.loads((tmp_path / "results.json").read_text())["notes"] == report.notes


@pytest.mark.parametrize("increases", [[0.1, 0.002], [0.1, -0.01], []])
def test_picture_of_any_signs(increases: list[float]) -> None:
    pytest.importorskip("matplotlib")
    made = picture([Point("a_$b^2", 8.0 + d, d) for d in increases], "$m_1, text")
    assert made is not None
    assert made.startswith(PNG)


def test_front_has_no_point_that_another_undercuts() -> None:
    points = [Point("a", 4.0, 0.1), Point("b", 3.0, 0.3), Point("c", 3.5, 0.3), Point("d", 4.0, 0.2), Point("e", 5, 0)]
    assert [point.name for point in pareto_front(points)] == ["b", "a", "e"]
    made = picture(points, "text", axis="bits", front=True, description="some words")
    assert made is None or b"some words" in made


def test_finished_run_leaves_three_tables_that_agree_and_a_picture(finished: Comparison) -> None:
    folder = finished.folder
    assert folder is not None
    written = json.loads((folder / "results.json").read_text())
    assert written == json.loads(json.dumps(finished.to_dict()))
    assert (folder / "table.md").read_text() == finished.markdown()
    assert (folder / "table.csv").read_text() == finished.csv()
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "picture.png").read_bytes().startswith(PNG)
    assert [row["recipe"] for row in written["rows"]] == ["rtn", "gptq:activation_bits=4"]
    for row in written["rows"]:
        assert row["model"] == written["model"] == "random"
        assert row["seeds"] == [0, 1]
        assert row["reason"] is None
        assert row["activation_bits"] == 4
        assert 4 < row["linear_bits_per_parameter"] < 16
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 10**7
        assert row["tasks"] == {}
        assert set(row["texts"]) == {"first", "second"}
        assert {key: row[key] for key in row["texts"]["first"]} == row["texts"]["first"]
        for key in ("nll_increase", "nll_increase_spread", "perplexity", "kl_mean", "top1_agreement", "seconds"):
            assert isinstance(row[key], float)
    assert written["rows"][1]["expected"][0]["value"] == 6.09
    assert all(0 < cell["site_figures"]["output_error"] < 1 for cell in finished.cells)
    assert written["protocol"]["evaluation"]["second"]["samples"] == 2


def test_figures_are_those_of_an_evaluation_of_the_same_checkpoint(
    finished: Comparison, model: Path, options: dict[str, Any]
) -> None:
    cell = next(cell for cell in finished.cells if cell["recipe"] == "rtn" and cell["seed"] == 1)
    (checkpoint,) = finished.folder.glob("checkpoints/rtn-*-s1")  # type: ignore[union-attr]
    report = mergequant.evaluate(checkpoint, model, data=options["evaluation"]["second"], samples=2, seqlen=32)
    for key in ("nll_increase", "kl_mean", "top1_agreement"):
        assert cell["texts"]["second"][key] == pytest.approx(report.to_dict()[key], rel=1e-6)
    assert finished.float_["texts"]["second"]["perplexity"] == pytest.approx(report.float_.likelihood.perplexity)  # type: ignore[union-attr]


def test_files_are_named_only_where_they_are(finished: Comparison, tmp_path: Path) -> None:
    assert {"table.md", "table.csv", "results.json"} <= set(finished.files())
    assert replace(finished, folder=tmp_path).files() == []
    assert replace(finished, folder=None).files() == []
