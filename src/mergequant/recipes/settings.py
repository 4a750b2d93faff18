"""Settings and lists of recipes as people write them: `split=0.1`, `gptq,mergequant:split=0.05:other=static,x.yaml`."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from mergequant.errors import UsageError
from mergequant.recipes.recipe import Recipe, load_recipe

__all__ = ["parse_recipes", "parse_settings"]

OPENING, CLOSING = "[{(", "]})"
NEXT_SETTING = re.compile(r":(?=[A-Za-z_][\w.]*=)")  # any other colon belongs to a value


def parse_settings(pairs: Sequence[str], where: str = "--set") -> dict[str, Any]:
    """{"split": 0.0} from ("split=0.0",); values are YAML. `where` begins the message of an error.

    Raises:
        UsageError: no "=", an empty key, or a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{where} {pair}: write key=value, for example split=0.1")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{where} {pair}: the value is not YAML ({error})") from error
        settings[key.strip()] = _number(value) if isinstance(value, str) else value
    return settings


def parse_recipes(text: str) -> dict[str, Recipe]:
    """Recipes by what was written for each, out of a list with commas between.

    An item is a registered name or a YAML file, which settings may follow: `NAME:KEY=VALUE:KEY=VALUE`. A word with "="
    behind such an item is one more setting of it, so `NAME:KEY=VALUE,KEY=VALUE` means the same, and is what the recipe
    is called in tables; commas inside brackets separate nothing.

    Raises:
        RecipeError: an unknown name or parameter (with the nearest known one), a value that does not fit.
        UsageError: an empty list, an item that is given twice, or a setting that belongs to no recipe.
    """
    items: list[tuple[str, list[str]]] = []
    for word in _split(text):
        head, equals, _ = word.partition("=")
        if equals and ":" not in head:
            if not items or not items[-1][1]:
                known = items[-1][0] if items else "NAME"
                raise UsageError(f"--recipes {text}: {word} follows no recipe; write {known}:{word}")
            items[-1][1].extend(NEXT_SETTING.split(word))
            continue
        name, _, settings = word.partition(":")
        items.append((name, NEXT_SETTING.split(settings) if settings else []))
    if not items:
        raise UsageError("--recipes is empty; name some that `mergequant recipes` lists, as rtn,gptq,mergequant")
    found: dict[str, Recipe] = {}
    for name, pairs in items:
        label = f"{name}:{','.join(pairs)}" if pairs else name
        if label in found:
            raise UsageError(f"--recipes {text}: {label} is given twice; leave one out")
        recipe = load_recipe(name)
        changes = parse_settings(pairs, f"--recipes {label}:")
        found[label] = recipe.with_settings(changes) if changes else recipe
    return found


def _split(text: str) -> list[str]:
    """Words between the commas that stand outside of brackets."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth <= 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def _number(text: str) -> str | float:
    """YAML 1.1 takes 1e-3 for a word; people do not."""
    try:
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text
