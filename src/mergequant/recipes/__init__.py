"""Recipes: one paper, one file."""

from mergequant.recipes import awq, baselines, mergequant, quarot, smoothquant
from mergequant.recipes.recipe import Figure, Recipe, get_recipe, list_recipes, load_recipe, register_recipe

__all__ = [
    "Figure",
    "Recipe",
    "awq",
    "baselines",
    "get_recipe",
    "list_recipes",
    "load_recipe",
    "mergequant",
    "quarot",
    "register_recipe",
    "smoothquant",
]
