"""Settings and lists of recipes as they are written on a command line."""

from pathlib import Path

import pytest

from mergequant.errors import RecipeError, UsageError
from mergequant.recipes.settings import parse_recipes, parse_settings


def test_settings_are_yaml_with_plain_numbers() -> None:
    pairs = ("split=1e-3", "stagger=off", "clip.mode=none", "prefix=[1, 2]", "tile=64", "name=+-")
    assert parse_settings(pairs) == {
        "split": 0.001, "stagger": False, "clip.mode": "none", "prefix": [1, 2], "tile": 64, "name": "+-",
    }  # fmt: skip


def test_recipes_keep_their_order_and_take_settings() -> None:
    found = parse_recipes("rtn, mergequant:split=0.05,other=static,prefix=[1,5],gptq:activation_bits=4,clip=off")
    assert list(found) == ["rtn", "mergequant:split=0.05,other=static,prefix=[1,5]", "gptq:activation_bits=4,clip=off"]
    _, mine, gptq = found.values()
    assert mine.parameters["split"] == 0.05
    assert mine.parameters["other"] == "static"
    assert mine.prefix == (1, 5)
    assert gptq.parameters["activation_bits"] == 4
    assert gptq.parameters["clip"] is False


def test_settings_may_be_separated_by_colons() -> None:
    text = "quarot:activation_clip=search:prefix=bos,gptq:bits.x=1:2"
    with pytest.raises(RecipeError, match="no step 'bits'"):
        parse_recipes(text)
    found = parse_recipes("quarot:activation_clip=search:prefix=[1,5],heads=none:rounding=rtn,rtn")
    label, plain = found
    assert label == "quarot:activation_clip=search,prefix=[1,5],heads=none,rounding=rtn"
    assert plain == "rtn"
    assert {key: found[label].parameters[key] for key in ("activation_clip", "heads", "rounding")} == {
        "activation_clip": "search", "heads": "none", "rounding": "rtn",
    }  # fmt: skip
    assert list(parse_recipes(label)) == [label]
    with pytest.raises(UsageError, match="twice"):
        parse_recipes("rtn:clip=true:weight_bits=8,rtn:clip=true,weight_bits=8")


def test_recipe_files_stand_beside_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: rtn\nclip: true\n", encoding="utf-8")
    found = parse_recipes(f"{path},{path}:weight_bits=8,rtn")
    assert [recipe.parameters["weight_bits"] for recipe in found.values()] == [4, 8, 4]
    assert [recipe.parameters["clip"] for recipe in found.values()] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", UsageError, "--recipes is empty"),
        ("rtn,gtpq", RecipeError, "did you mean 'gptq'"),
        ("mergequant:splt=0.1", RecipeError, "did you mean 'split'"),
        ("mergequant:split=many", RecipeError, "does not fit"),
        ("rtn,split=0.1", UsageError, "write rtn:split=0.1"),
        ("split=0.1", UsageError, "write NAME:split=0.1"),
        ("rtn,rtn", UsageError, "twice"),
        ("rtn:clip", UsageError, "write key=value"),
        ("rtn:clip={", UsageError, "not YAML"),
        ("nowhere.yaml", RecipeError, "nowhere.yaml"),
    ],
)
def test_wrong_list_says_what_to_write(text: str, error: type[UsageError], words: str) -> None:
    with pytest.raises(error, match=words.replace("[", r"\[")):
        parse_recipes(text)
