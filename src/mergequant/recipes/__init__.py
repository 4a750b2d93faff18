"""Recipes: one paper, one file."""

from mergequant.recipes import (
    awq,
    baselines,
    flatquant,
    mergequant,
    outlier_suppression_plus,
    outliertune,
    prefixquant,
    qllm,
    qserve,
    quarot,
    smoothquant,
    spinquant,
)
from mergequant.recipes.recipe import Figure, Recipe, get_recipe, list_recipes, load_recipe, register_recipe

__all__ = [
    "Figure",
    "Recipe",
    "awq",
    "baselines",
    "flatquant",
    "get_recipe",
    "list_recipes",
    "load_recipe",
    "mergequant",
    "outlier_suppression_plus",
    "outliertune",
    "prefixquant",
    "qllm",
    "qserve",
    "quarot",
    "register_recipe",
    "smoothquant",
    "spinquant",
]
