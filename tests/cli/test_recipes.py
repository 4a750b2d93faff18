from pathlib import Path
from typing import Any

import pytest

from mergequant.recipes import Recipe, list_recipes, load_recipe


def test_recipes_lists_every_name(run: Any) -> None:
    result = run("recipes")
    assert result.exit_code == 0
    for name in list_recipes():
        assert name in result.stdout


@pytest.mark.parametrize("name", list_recipes())
def test_show_tells_parameters_and_steps(run: Any, name: str) -> None:
    result = run("recipes", "show", name)
    assert result.exit_code == 0, result.output
    assert all(parameter in result.stdout for parameter in load_recipe(name).parameters)
    assert all(step.name in result.stdout for step in load_recipe(name).steps)


def test_show_yaml_reads_back(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(run("recipes", "show", "mergequant", "--set", "split=0.1", "--yaml").stdout)
    recipe = load_recipe(str(file))
    assert recipe == load_recipe("mergequant").with_settings({"split": 0.1})
    assert isinstance(recipe, Recipe)
    assert "mergequant" in run("recipes", "show", file).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shw"], "did you mean 'show'?"),
        (["show", "mergquant"], "did you mean 'mergequant'?"),
        (["show"], "NAME_OR_YAML"),
    ],
)
def test_recipes_wrong_use_exits_2(run: Any, arguments: list[str], words: str) -> None:
    result = run("recipes", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
