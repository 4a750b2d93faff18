"""Tables and claims of the channel family from made-up runs, and the suites of benchmarks/suites.py."""

from types import ModuleType
from typing import Any

import pytest

from accuracy_runs import load, rows
from mergequant.pipeline.run import Silent
from mergequant.recipes import get_recipe, list_recipes


@pytest.fixture(scope="module")
def family() -> ModuleType:
    return load("family")


@pytest.fixture
def runs() -> dict[str, Any]:
    figure = {"metric": "WikiText-2 perplexity", "value": 6.1, "setting": "big (float 5.47)", "source": "paper"}
    return {
        "rows": [
            *rows("quarot", "quarot", "ref", [0.06, 0.07, 0.08]),
            *rows("quarot", "quarot", "ref_outlier", [0.12, 0.13, 0.14]),
            *rows("mergequant-plus", "mergequant-plus", "ref", [0.05, 0.06, 0.07]),
            *rows("mergequant-plus", "mergequant-plus", "ref_outlier", [0.05, 0.06, 0.07]),
        ],
        "order": ["quarot", "mergequant-plus"],
        "machine": {"device": "GPU"},
        "protocol": {"calibration": "some text", "evaluation": "other text"},
        "command": "python benchmarks/accuracy.py",
        "expected": {"quarot": [{**figure, "nll_increase": 0.109}]},
        "left_out": {"qllm W4A4": "unknown recipe 'qllm'"},
        "refused": {"ref": {"qserve W4A8": "no sites"}, "ref_outlier": {}},
    }


@pytest.mark.parametrize(
    ("left", "right", "factor", "verdict"),
    [
        ([1.0, 1.1], [1.2, 1.3], 1.0, "holds"),
        ([1.0, 1.3], [1.2, 1.4], 1.0, "holds, within the spread"),
        ([1.2, 1.4], [1.0, 1.3], 1.0, "fails, within the spread"),
        ([1.4, 1.5], [1.2, 1.3], 1.0, "fails"),
        ([1.4, 1.5], [1.2, 1.3], 1.5, "holds"),
        ([1.0], [1.0], 1.0, "holds, within the spread"),
    ],
)
def test_claims_know_the_spread_over_seeds(
    family: ModuleType, left: list[float], right: list[float], factor: float, verdict: str
) -> None:
    assert family.judge(left, right, factor) == verdict


def test_marks_and_orders_are_judged_from_the_runs(family: ModuleType, runs: dict[str, Any]) -> None:
    marks = family.marks(runs)
    assert "| quarot | at most 0.075 / 0.125 | 0.0700 ± 0.0100 (met) | 0.1300 ± 0.0100 (missed) |" in marks
    assert "| prefixquant | at most 0.120 / 0.150 | not measured | not measured |" in marks
    assert "| smoothquant W4A4 | about" in marks
    orders = family.orders(runs)
    within, clear = "holds, within the spread (0.86x)", "holds (0.46x)"
    assert f"| mergequant-plus <= quarot | {within} | {within} | {clear} | {clear} |" in orders
    assert "| mergequant-w4a8 <= gptq W4A16 x 1.5 / x 1 | not measured" in orders


def test_papers_stand_beside_our_rows_and_reasons_are_told(family: ModuleType, runs: dict[str, Any]) -> None:
    papers = family.papers(runs)
    assert "| quarot | WikiText-2 perplexity | 6.1 | 0.109 | big (float 5.47) | paper |" in papers
    assert "| quarot | quarot | 0.0700 ± 0.0100 | 0.1300 ± 0.0100 |" in papers
    assert family.absent(runs) == "- qllm W4A4: unknown recipe 'qllm'\n- qserve W4A8 on ref: no sites\n"
    assert family.absent({"left_out": {}}) == "None.\n"


def test_planted_table_shows_winners_and_claims_that_fail(family: ModuleType) -> None:
    runs = {
        "structures": {"none": "nothing", "strong": "strong channels"},
        "order": ["rtn", "mergequant"],
        "rows": [
            {"structure": "strong", "label": "rtn", "kl": [1.0, 1.2]},
            {"structure": "strong", "label": "mergequant", "kl": [0.3, 0.3]},
        ],
        "winners": {"none": [], "strong": ["mergequant"]},
        "claims": [
            {"text": "it wins", "factor": 0.9, "ratio": 0.3, "holds": True, "why": ""},
            {"text": "it loses", "factor": 0.9, "ratio": 4.0, "holds": False, "why": "so it is"},
        ],
        "command": "python benchmarks/planted.py",
        "about": "two seeds",
    }
    text = family.planted(runs)
    assert "| rtn | - | 1.1000 ± 0.1000 |" in text
    assert "| mergequant | - | **0.3000 ± 0.0000** |" in text
    assert "| it wins | 0.30 | <= 0.9 | holds |" in text
    assert "| it loses | 4.00 | <= 0.9 | **fails**: so it is |" in text


def test_family_table_has_widths_and_times_where_the_runs_have(runs: dict[str, Any]) -> None:
    table = load("render").table(runs)
    assert "| linear bits | act bits | s |" in table
    assert "| 4.10 | 4.0 | 30 |" in table
    assert "| - | - | 16 | 16 | - |" in table
    for row in runs["rows"]:
        del row["activation_bits"]
    assert "act bits" not in load("render").table(runs)


def test_every_label_that_is_judged_is_in_the_suite_and_every_recipe_is_measured(family: ModuleType) -> None:
    suites = load("suites")
    labels = {*family.MARKS, *family.ABOUT, *(label for order in family.ORDERS for label in (order.left, order.right))}
    assert labels <= set(suites.SUITES["family"])
    measured = {recipe for suite in suites.SUITES.values() for recipe, _ in suite.values()}
    assert measured >= set(list_recipes())


@pytest.mark.parametrize("suite", ["all", "kv", "family", "weights"])
def test_settings_of_suites_fit_the_recipes(suite: str) -> None:
    for name, settings in load("suites").SUITES[suite].values():
        if name in list_recipes():
            get_recipe(name).with_settings(settings)


def test_recipes_that_are_not_there_are_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = load("accuracy")
    known: dict[str, Any] = {}
    suite = {"a": ("gtpq", {}), "b": ("gptq", {"weight_bit": 3}), "c": ("gptq", {"weight_bits": 3})}
    found = accuracy.available(suite, known)
    assert list(found) == ["c"]
    assert "did you mean 'gptq'" in known["left_out"]["a"]
    assert "did you mean 'weight_bits'" in known["left_out"]["b"]
    assert known["expected"]["gptq"][0]["nll_increase"] == pytest.approx(0.0697, abs=1e-3)
    assert "left out: a:" in capsys.readouterr().err


def test_reporter_of_the_script_has_all_that_runs_call() -> None:
    calls = {name for name in dir(Silent) if not name.startswith("_")}
    assert calls <= set(dir(load("accuracy").Lines))
