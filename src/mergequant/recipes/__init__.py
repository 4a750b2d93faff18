"""Recipes: one paper, one file."""

from mergequant.recipes import baselines, mergequant
from mergequant.recipes.recipe import Figure, Recipe, get_recipe, list_recipes, load_recipe, register_recipe

__all__ = [
    "Figure",
    "Recipe",
    "baselines",
    "get_recipe",
    "list_recipes",
    "load_recipe",
    "mergequant",
    "register_recipe",
]
