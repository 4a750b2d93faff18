"""Recipes: the register, YAML, and settings."""

from pathlib import Path
from typing import Any

import pytest

from mergequant.errors import RecipeError
from mergequant.pipeline.blocks import _runs
from mergequant.recipes import Recipe, get_recipe, list_recipes, load_recipe, recipe, register_recipe
from mergequant.steps import (
    ALL_SITES,
    Clip,
    Compensate,
    LowRank,
    Prune,
    Ranges,
    Rotate,
    Round,
    Split,
    Step,
    TensorInput,
    TokenInput,
)

FIVE = ["gptq", "mergequant", "mergequant-plus", "mergequant-w4a8", "rtn"]


def names(chosen: Recipe) -> list[str]:
    return [step.name for step in chosen.steps]


def step_of(chosen: Recipe, kind: type[Step], position: int = 0) -> Any:
    return [step for step in chosen.steps if isinstance(step, kind)][position]


def test_list_recipes_when_asked_expect_sorted_names_of_the_release() -> None:
    assert [name for name in list_recipes() if name in FIVE] == FIVE
    assert list_recipes() == sorted(list_recipes())


@pytest.mark.parametrize("name", FIVE)
def test_yaml_when_read_back_expect_the_same_recipe(name: str, tmp_path: Path) -> None:
    chosen = get_recipe(name)
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen
    path = tmp_path / "own.yaml"
    path.write_text(chosen.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == chosen == load_recipe(name)
    assert chosen.paper
    assert "!!" not in chosen.to_yaml()  # plain data only


@pytest.mark.parametrize("name", FIVE)
def test_yaml_when_every_parameter_differs_expect_the_same_recipe_back(name: str) -> None:
    chosen = get_recipe(name)
    changed: dict[str, Any] = {
        key: value + 1 if type(value) is int else value / 2 if isinstance(value, float) else value
        for key, value in chosen.parameters.items()
    }
    changed |= {key: not value for key, value in chosen.parameters.items() if isinstance(value, bool)}
    if "prefix" in changed:
        changed["prefix"] = [4, 5]
    if name in ("gptq", "rtn"):
        changed["activation_bits"] = 8
    if name == "mergequant":
        changed["other"] = "static"  # what can be trained
    other = chosen.with_settings(changed)
    assert other != chosen
    assert Recipe.from_yaml(other.to_yaml()) == other


@pytest.mark.parametrize("name", FIVE)
def test_recipe_when_built_expect_its_last_step_to_round_every_site(name: str) -> None:
    last = get_recipe(name).steps[-1]
    assert isinstance(last, Round)
    assert last.sites == ALL_SITES


def test_from_yaml_when_a_registered_name_is_given_expect_its_parameters_applied() -> None:
    chosen = Recipe.from_yaml("recipe: mergequant\nsplit: 0\nclip.norm: 3\n")
    assert chosen == get_recipe("mergequant", split=0.0).with_settings({"clip.norm": 3.0})


def test_from_yaml_when_written_as_steps_expect_those_steps() -> None:
    text = """
name: mine
prefix: [1, 2]
steps:
  - {step: token_input, sites: [mlp_output], bits: 8}
  - {step: round, method: rtn}
"""
    chosen = Recipe.from_yaml(text)
    assert chosen == Recipe("mine", "", (TokenInput(("mlp_output",), 8), Round(method="rtn")), (1, 2))
    assert chosen.with_settings({"round.bits": 3}).steps[-1] == Round(method="rtn", bits=3)
    with pytest.raises(RecipeError, match=r"written as steps; address one as step\.bits=value"):
        chosen.with_settings({"bits": 3})


WRONG_YAML: list[tuple[str, str]] = [
    ("- a\n- b", "a recipe is a mapping"),
    ("3", "a recipe is a mapping"),
    ("a: [", "not YAML"),
    ("!!python/object/apply:os.system ['true']", "not YAML"),
    ("name: x", "give 'recipe: NAME'"),
    ("name: x\nsteps: round", "give 'recipe: NAME'"),
    ("name: x\nsteps: []", "no steps"),
    ("recipe: mergquant", "did you mean 'mergequant'"),
    ("recipe: mergequant\nsplt: 0", "did you mean 'split'"),
    ("recipe: mergequant\n3: 0", "key 3 is not a word"),
    ("name: x\nstep: []\nsteps: []", "did you mean 'steps'"),
    ("steps:\n- step: rond", "step 1: unknown step 'rond'; did you mean 'round'"),
    ("steps:\n- step: round\n- step: round\n  bitz: 3", "step 2.*did you mean 'bits'"),
    ("prefix: boss\nsteps:\n- step: round", "did you mean 'bos'"),
    ("prefix: 3\nsteps:\n- step: round", "prefix: 3 does not fit"),
    ("prefix: [a]\nsteps:\n- step: round", "prefix.*does not fit"),
    ("prefix: []\nsteps:\n- step: round", "holds no token"),
    ("parameters: [1]\nsteps:\n- step: round", "'parameters' is a mapping"),
    ("expected: [{metric: x}]\nsteps:\n- step: round", "metric, value, setting, source"),
    ("expected: [3]\nsteps:\n- step: round", "metric, value, setting, source"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_YAML)
def test_from_yaml_when_wrong_expect_error_that_says_where_and_what(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_yaml(text, "own.yaml")


def test_load_recipe_when_no_such_name_or_file_expect_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        load_recipe("gptqq")
    with pytest.raises(RecipeError, match=r"missing\.yaml"):
        load_recipe(str(tmp_path / "missing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml"):
        load_recipe(str(tmp_path / "binary.yaml"))


WRONG_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("mergequant", {"split": "much"}, "'much' does not fit; allowed: float, 'auto'"),
    ("mergequant", {"split": True}, "does not fit"),
    ("mergequant", {"split": -0.1}, "budgets"),
    ("mergequant", {"weight_bits": 4.0}, "allowed: int"),
    ("mergequant", {"stagger": 1}, "allowed: bool"),
    ("mergequant", {"other": "sttic"}, "'static'"),
    ("mergequant", {"width": None}, "'prune', 'pad', 'keep'"),
    ("mergequant", {"prefix": "boss"}, "did you mean 'bos'"),
    ("mergequant", {"prefix": ()}, "holds no token"),
    ("mergequant", {"prefix": ("a",)}, "does not fit"),
    ("mergequant", {"ridge": float("nan")}, "does not fit"),
    ("rtn", {"bits": 4}, "has no parameter 'bits'"),
    ("gptq", {"activation_order": "yes"}, "allowed: bool"),
]


@pytest.mark.parametrize(("name", "parameters", "words"), WRONG_VALUES)
def test_get_recipe_when_a_value_does_not_fit_expect_error_that_lists_what_does(
    name: str, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        get_recipe(name, **parameters)


def test_with_settings_when_flat_keys_expect_parameters_and_steps_to_follow() -> None:
    chosen = get_recipe("mergequant").with_settings({"weight_bits": 8, "split": 0})
    assert chosen.parameters["weight_bits"] == 8
    assert step_of(chosen, Round).bits == 8
    assert "split" not in names(chosen)
    assert get_recipe("mergequant").parameters["weight_bits"] == 4  # the register is untouched


def test_with_settings_when_step_keys_expect_only_that_parameter_changed() -> None:
    before = get_recipe("mergequant")
    after = before.with_settings({"clip.steps": 3, "round.damping": 0.5})
    assert step_of(after, Clip).steps == 3
    assert step_of(after, Round).damping == 0.5
    others = [(a, b) for a, b in zip(before.steps, after.steps, strict=True) if not isinstance(a, (Clip, Round))]
    assert all(a == b for a, b in others)


def test_with_settings_when_both_kinds_are_mixed_expect_both_whatever_their_order() -> None:
    one = get_recipe("mergequant").with_settings({"clip.steps": 3, "weight_bits": 8})
    other = get_recipe("mergequant").with_settings({"weight_bits": 8, "clip.steps": 3})
    assert one == other
    assert (step_of(one, Clip).steps, step_of(one, Round).bits) == (3, 8)


def test_with_settings_when_a_later_flat_key_would_undo_step_keys_expect_error() -> None:
    changed = get_recipe("mergequant").with_settings({"clip.steps": 3})
    assert changed.with_settings({"clip.norm": 2.0}) == get_recipe("mergequant").with_settings(
        {"clip.steps": 3, "clip.norm": 2.0}
    )
    with pytest.raises(RecipeError, match="weight_bits would undo"):
        changed.with_settings({"weight_bits": 8})
    reread = Recipe.from_yaml(changed.to_yaml())
    with pytest.raises(RecipeError, match="would undo"):
        reread.with_settings({"weight_bits": 8})
    plain = Recipe.from_yaml(get_recipe("mergequant").to_yaml())
    assert plain.with_settings({"weight_bits": 8}) == get_recipe("mergequant", weight_bits=8)


WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"clipp.steps": 3}, "no step 'clipp'; did you mean 'clip'"),
    ({"clip.stepz": 3}, "did you mean 'steps'"),
    ({"clip.steps": "many"}, "setting clip.steps.*allowed: int"),
    ({"clip.mode": "hard"}, "'joint'"),
    ({"rotate.sites": ["norm"]}, "no step 'rotate'"),
    ({"wdth": "pad"}, "did you mean 'width'"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_SETTINGS)
def test_with_settings_when_wrong_expect_error_with_the_nearest_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        get_recipe("mergequant").with_settings(settings)


SWITCHES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["ranges", "split", "clip", "prune", "token_input", "compensate", "round"]),
    ({"split": 0.0}, ["ranges", "clip", "token_input", "compensate", "round"]),
    ({"clip": "none"}, ["ranges", "split", "prune", "token_input", "compensate", "round"]),
    ({"width": "pad"}, ["ranges", "split", "clip", "token_input", "compensate", "round"]),
    ({"width": "keep"}, ["ranges", "split", "clip", "token_input", "compensate", "round"]),
    ({"compensation": "none"}, ["ranges", "split", "clip", "prune", "token_input", "round"]),
    ({"compensation": "low_rank"}, ["ranges", "split", "clip", "prune", "token_input", "low_rank", "round"]),
    ({"other": "hadamard"}, ["ranges", "split", "clip", "prune", "rotate", "token_input", "compensate", "round"]),
    (
        {"other": "hadamard-static", "prefix": "bos"},
        ["ranges", "split", "clip", "prune", "rotate", "tensor_input", "compensate", "round"],
    ),
    (
        {"other": "static", "prefix": "bos"},
        ["ranges", "split", "clip", "prune", "ranges", "clip", "compensate", "round"],
    ),
    (
        {"other": "static", "prefix": "auto", "other_split": 0.1, "clip": "none"},
        ["ranges", "split", "prune", "ranges", "split", "compensate", "round"],
    ),
]


@pytest.mark.parametrize(("parameters", "expected"), SWITCHES)
def test_mergequant_when_an_ingredient_is_switched_expect_its_steps(
    parameters: dict[str, Any], expected: list[str]
) -> None:
    assert names(get_recipe("mergequant", **{"split": 0.05, **parameters})) == expected


CHANGES: list[tuple[dict[str, Any], type[Step], dict[str, Any]]] = [
    ({"weight_bits": 8}, Round, {"bits": 8}),
    ({"weight_bits": 8}, Split, {"weight_bits": 8}),
    ({"weight_bits": 8}, Clip, {"weight_bits": 8}),
    ({"activation_bits": 8}, Ranges, {"bits": 8, "sites": ("norm", "stream")}),
    ({"quantile": 0.99}, Ranges, {"quantile": 0.99}),
    ({"split": 0.2}, Split, {"budgets": (0.2,)}),
    ({"strength": "step"}, Split, {"strength": "step"}),
    ({"strength": "column"}, Split, {"strength": "column"}),
    ({"stagger": True}, Split, {"stagger": True}),
    ({"stagger": False}, Split, {"stagger": False}),
    ({"width": "pad", "tile": 128}, Split, {"tile": 128, "prune": False}),
    ({"width": "keep"}, Split, {"tile": 0, "prune": False}),
    ({"width": "prune"}, Split, {"tile": 0, "prune": True}),
    ({"clip": "activation"}, Clip, {"mode": "activation"}),
    ({"ridge": 0.7}, Compensate, {"ridge": 0.7}),
    ({"rounding": "rtn"}, Round, {"method": "rtn"}),
    ({"rounding": "rtn"}, Clip, {"rounding": "rtn"}),
    ({"other_bits": 8}, TokenInput, {"bits": 8, "sites": ("attention_output", "mlp_output")}),
    ({"other": "hadamard-static", "other_bits": 8, "prefix": "bos"}, TensorInput, {"bits": 8}),
    ({"other": "hadamard"}, Rotate, {"sites": ("attention_output", "mlp_output")}),
    ({"compensation": "low_rank", "weight_bits": 8}, LowRank, {"weight_bits": 8}),
    ({"width": "prune"}, Prune, {"sites": ("norm", "stream")}),
]


@pytest.mark.parametrize(("parameters", "kind", "fields"), CHANGES)
def test_mergequant_when_a_parameter_is_set_expect_it_in_its_step(
    parameters: dict[str, Any], kind: type[Step], fields: dict[str, Any]
) -> None:
    step = step_of(get_recipe("mergequant", **{"split": 0.05, **parameters}), kind)
    assert {name: getattr(step, name) for name in fields} == fields


def test_mergequant_when_split_is_auto_expect_several_budgets_and_none_among_them() -> None:
    budgets = step_of(get_recipe("mergequant", split="auto"), Split).budgets
    assert len(budgets) > 2
    assert 0.0 in budgets


@pytest.mark.parametrize("other", ["static", "hadamard-static"])
@pytest.mark.parametrize("name", ["mergequant", "mergequant-plus", "mergequant-w4a8"])
def test_mergequant_when_static_without_prefix_expect_refused_unless_allowed(name: str, other: str) -> None:
    with pytest.raises(RecipeError, match=r"needs a prefix.*allow_no_prefix"):
        get_recipe(name, other=other, prefix="none")
    assert get_recipe(name, other=other, prefix="none", allow_no_prefix=True).prefix == "none"
    assert get_recipe(name, other=other, prefix=[1, 2]).prefix == (1, 2)
    assert get_recipe(name, other=other, prefix="auto").prefix == "auto"
    for dynamic in ("dynamic", "hadamard"):
        assert get_recipe(name, other=dynamic, prefix="none").prefix == "none"


def test_static_recipes_when_built_expect_no_dynamic_input() -> None:
    for name in ("mergequant-plus", "mergequant-w4a8"):
        assert "token_input" not in names(get_recipe(name))
        assert get_recipe(name).prefix == "bos"
    assert step_of(get_recipe("mergequant-w4a8"), Ranges).bits == 8


def test_baselines_when_weight_only_expect_no_input_step() -> None:
    assert names(get_recipe("rtn")) == ["token_input", "round"]
    assert names(get_recipe("rtn", activation_bits=16)) == ["round"]
    assert names(get_recipe("gptq")) == ["round"]
    assert names(get_recipe("gptq", activation_bits=8)) == ["token_input", "round"]
    assert step_of(get_recipe("gptq", activation_bits=4, activation_clip=True), TokenInput).search


def test_register_recipe_when_a_name_is_taken_expect_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_REGISTER", dict(recipe._REGISTER))

    def rtn() -> Any:
        """A function of the very same name, but of another module."""
        return (Round(),), "none"

    rtn.__qualname__ = "rtn"
    with pytest.raises(RecipeError, match=r"'rtn' is taken by mergequant\.recipes\.baselines\.rtn"):
        register_recipe("rtn", paper="x")(rtn)
    register_recipe("rtn-of-mine", paper="x")(rtn)
    register_recipe("rtn-of-mine", paper="x")(rtn)  # a module that is loaded again
    assert get_recipe("rtn-of-mine").steps == (Round(),)
    assert "rtn-of-mine" in list_recipes()


def test_runs_when_block_steps_stand_between_site_steps_expect_groups_in_order() -> None:
    steps: tuple[Step, ...] = (Ranges(), Clip(), LowRank(), LowRank(rank=2), Round())
    groups = [[step.name for step in group] for group in _runs(steps)]
    assert groups == [["ranges", "clip"], ["low_rank", "low_rank"], ["round"]]
    assert [[step.name for step in group] for group in _runs((Ranges(), Round()))] == [["ranges", "round"]]
