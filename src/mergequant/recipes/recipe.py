"""Recipes: a paper as an ordered list of steps with explicit parameters, and the register that knows them by name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mergequant.errors import RecipeError
from mergequant.steps import ALL_SITES, AllocateBits, ModelStep, Round, Step, fitting, near_name, step_from_dict

__all__ = [
    "Figure",
    "PrefixChoice",
    "Recipe",
    "describe_recipe",
    "get_recipe",
    "list_recipes",
    "load_recipe",
    "register_recipe",
]

PrefixChoice = str | tuple[int, ...]
"""'none', 'bos', 'auto' (outlier tokens are searched), or explicit token ids."""

PREFIX_WORDS = ("none", "bos", "auto")
OTHER_NAMES = {"prefix_tokens": "prefix"}  # of a parameter: what papers call it


@dataclass(frozen=True)
class Figure:
    """A figure that a paper reports: what, its value, in which setting, and where it stands."""

    metric: str
    value: float
    setting: str
    source: str


@dataclass(frozen=True)
class Recipe:
    """An ordered list of steps, and what surrounds them.

    Attributes:
        name: registered name, or the name a YAML file gives itself.
        paper: what it implements.
        steps: the passes, in order.
        prefix: tokens whose keys and values every cache starts with.
        parameters: the flat parameters that the steps were made from; empty for recipes written as steps.
        expected: figures of the paper, with their settings.
    """

    name: str
    paper: str
    steps: tuple[Step, ...]
    prefix: PrefixChoice = "none"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    expected: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        if not self.steps:
            raise RecipeError(f"recipe {self.name!r} has no steps")
        whole = [isinstance(step, ModelStep) for step in self.steps]
        if whole != sorted(whole, reverse=True):
            late = next(step.name for step, on_model in reversed(list(zip(self.steps, whole))) if on_model)
            raise RecipeError(f"recipe {self.name!r}: step {late!r} changes the whole model; put it before all others")
        if isinstance(self.prefix, str) and self.prefix not in PREFIX_WORDS:
            raise RecipeError(f"recipe {self.name!r}: prefix {self.prefix!r}{near_name(self.prefix, PREFIX_WORDS)}")
        if not self.prefix:
            raise RecipeError(f"recipe {self.name!r}: the prefix holds no token; say prefix=none")

    def with_settings(self, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe with other parameters ("split": 0), step parameters ("clip.mode": "none"), or "average_bits".

        Raises:
            RecipeError: an unknown key, with the nearest known one, or a value that does not fit.
        """
        flat = {key: value for key, value in settings.items() if "." not in key}
        recipe = self
        budget = None if "average_bits" in self.parameters else flat.pop("average_bits", None)
        if flat:
            if not self.parameters:
                key = next(iter(flat))
                raise RecipeError(f"recipe {self.name!r} is written as steps; address one as step.{key}=value")
            unchanged = get_recipe(self.name, **self.parameters)
            if (unchanged.steps, unchanged.prefix) != (self.steps, self.prefix):
                raise RecipeError(
                    f"recipe {self.name!r}: its steps were changed one by one, which {', '.join(flat)} would undo; "
                    "give all settings at once, or address steps as step.key=value"
                )
            recipe = get_recipe(self.name, **{**self.parameters, **flat})
        for key, value in settings.items():
            if "." in key:
                recipe = recipe._with_step_setting(key, value)
        return recipe if budget is None else recipe.with_average_bits(fitting(budget, float, "average_bits"))

    def with_average_bits(self, average_bits: float) -> "Recipe":
        """The recipe with a width for every site, chosen so that the quantized weights take `average_bits` each.

        Any recipe's parameter `average_bits` means this, unless it has one of its own.

        Raises:
            RecipeError: no step rounds integers of one level, or several do that differ.
        """
        rounding = [step for step in self.steps if isinstance(step, Round)]
        forms = {(step.group_size, step.zeros, step.clip, step.levels, step.outliers) for step in rounding}
        if len(forms) != 1 or any(step.levels != 1 or step.outliers for step in rounding):
            raise RecipeError(
                f"recipe {self.name!r}: average_bits chooses the width of plain integers that one kind of step rounds; "
                f"here are {', '.join(step.name for step in self.steps)}. Choose rtn, gptq, awq, quantease or adadim"
            )
        kinds = tuple(kind for kind in ALL_SITES if any(kind in step.sites for step in rounding))
        first = rounding[0]
        step = AllocateBits(average_bits, group_size=first.group_size, zeros=first.zeros, clip=first.clip, kinds=kinds)
        others = [own for own in self.steps if not isinstance(own, AllocateBits)]
        place = sum(isinstance(own, ModelStep) for own in others)
        steps = (*others[:place], step, *others[place:])
        return Recipe(self.name, self.paper, steps, self.prefix, self.parameters, self.expected)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, whole."""
        return {
            "name": self.name,
            "paper": self.paper,
            "prefix": list(self.prefix) if isinstance(self.prefix, tuple) else self.prefix,
            "parameters": {key: list(v) if isinstance(v, tuple) else v for key, v in self.parameters.items()},
            "steps": [step.to_dict() for step in self.steps],
            "expected": [vars(figure) for figure in self.expected],
        }

    def to_yaml(self) -> str:
        """The recipe as YAML, readable by `from_yaml`."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "Recipe":
        """Build from a mapping: {"recipe": registered name, parameters...}, or a whole recipe with "steps".

        Raises:
            RecipeError: naming `where`, the key, and the nearest known one.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: a recipe is a mapping, found {type(data).__name__}")
        for key in data:
            if not isinstance(key, str):
                raise RecipeError(f"{where}: key {key!r} is not a word; write it in quotes")
        if "recipe" in data:
            settings = {key: value for key, value in data.items() if key != "recipe"}
            return get_recipe(str(data["recipe"])).with_settings(settings)
        known = ("name", "paper", "prefix", "parameters", "steps", "expected")
        for key in data:
            if key not in known:
                raise RecipeError(f"{where}: unknown key {key!r}{near_name(str(key), known)}")
        if not isinstance(data.get("steps"), list):
            raise RecipeError(f"{where}: give 'recipe: NAME' with parameters, or a list 'steps'")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise RecipeError(f"{where}: 'parameters' is a mapping, found {type(parameters).__name__}")
        expected = data.get("expected") or []
        return cls(
            str(data.get("name", "custom")),
            str(data.get("paper", "")),
            tuple(step_from_dict(step, f"{where}, step {number}") for number, step in enumerate(data["steps"], 1)),
            fitting(data.get("prefix", "none"), PrefixChoice, f"{where}, prefix"),
            {key: tuple(v) if isinstance(v, list) else v for key, v in parameters.items()},
            tuple(_figure(figure, where) for figure in expected),
        )

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Build from YAML text. Raises RecipeError."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{where}: not YAML: {error}") from error
        return cls.from_dict(data, where)

    def _with_step_setting(self, key: str, value: Any) -> "Recipe":
        step_name, _, parameter = key.partition(".")
        names = [step.name for step in self.steps]
        if step_name not in names:
            raise RecipeError(f"recipe {self.name!r} has no step {step_name!r}{near_name(step_name, names)}")
        steps = [
            step_from_dict({**step.to_dict(), parameter: value}, f"setting {key}") if step.name == step_name else step
            for step in self.steps
        ]
        return Recipe(self.name, self.paper, tuple(steps), self.prefix, self.parameters, self.expected)


Builder = Callable[..., tuple[tuple[Step, ...], PrefixChoice]]


@dataclass(frozen=True)
class _Registered:
    builder: Builder
    paper: str
    expected: tuple[Figure, ...]
    summary: str
    defaults: Mapping[str, Any]


_REGISTER: dict[str, _Registered] = {}


def register_recipe(
    name: str,
    *,
    paper: str,
    expected: tuple[Figure, ...] = (),
    summary: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Builder], Builder]:
    """Decorator: make a function of keyword parameters with defaults known as a recipe.

    The function returns the steps and the prefix choice. Its docstring describes the recipe and its parameters. A
    function may be registered under several names, with other `defaults` and a `summary` of its own for each.

    Raises:
        RecipeError: the name is taken by another function, or a default is no parameter or does not fit.
    """

    def register(builder: Builder) -> Builder:
        taken = _REGISTER.get(name)
        new = f"{builder.__module__}.{builder.__qualname__}"
        if taken is not None and f"{taken.builder.__module__}.{taken.builder.__qualname__}" != new:
            raise RecipeError(
                f"recipe name {name!r} is taken by {taken.builder.__module__}.{taken.builder.__qualname__}; "
                f"{new} needs another"
            )
        parameters, hints = inspect.signature(builder).parameters, get_type_hints(builder)
        for key, value in (defaults or {}).items():
            if key not in parameters:
                raise RecipeError(f"recipe {name!r}: default {key!r} is no parameter{near_name(key, parameters)}")
            fitting(value, hints[key], f"recipe {name!r}, default {key}")
        _REGISTER[name] = _Registered(builder, paper, expected, summary, dict(defaults or {}))
        return builder

    return register


def list_recipes() -> list[str]:
    """Names of all registered recipes, sorted."""
    return sorted(_REGISTER)


def describe_recipe(name: str) -> str:
    """What a registered recipe does and what its parameters mean; the first line is a summary. Raises RecipeError."""
    get_recipe(name)
    entry = _REGISTER[name]
    first, _, rest = (inspect.getdoc(entry.builder) or "").partition("\n")
    return f"{entry.summary or first}\n{rest}" if rest else entry.summary or first


def get_recipe(name: str, **parameters: Any) -> Recipe:
    """A registered recipe, with some parameters changed. `prefix_tokens` is another name of the parameter `prefix`.

    Raises:
        RecipeError: an unknown name or parameter (with the nearest known one), or a value of the wrong kind.
    """
    if name not in _REGISTER:
        raise RecipeError(f"unknown recipe {name!r}{near_name(name, _REGISTER)}")
    entry = _REGISTER[name]
    signature = inspect.signature(entry.builder)
    hints = get_type_hints(entry.builder)
    values: dict[str, Any] = {key: parameter.default for key, parameter in signature.parameters.items()}
    values |= entry.defaults
    for name_given, value in parameters.items():
        key = OTHER_NAMES.get(name_given, name_given)
        if key not in values:
            raise RecipeError(f"recipe {name!r} has no parameter {key!r}{near_name(key, values)}")
        values[key] = fitting(value, hints[key], f"recipe {name!r}, {key}")
    steps, prefix = entry.builder(**values)
    return Recipe(name, entry.paper, steps, prefix, values, entry.expected)


def load_recipe(name_or_path: str) -> Recipe:
    """A registered recipe by name, or one from a YAML file.

    Raises:
        RecipeError: neither a known name nor a readable file.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {name_or_path}: {error}") from error
        return Recipe.from_yaml(text, str(path))
    return get_recipe(name_or_path)


def _figure(data: Any, where: str) -> Figure:
    names = [field.name for field in fields(Figure)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise RecipeError(f"{where}: an expected figure is a mapping with the keys {', '.join(names)}, found {data!r}")
    return Figure(**data)
