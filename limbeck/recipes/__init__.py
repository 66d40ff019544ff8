"""Recipes: a run as a short file. Read them, check them, run them."""

from limbeck.recipes.check import check
from limbeck.recipes.load import load, shipped
from limbeck.recipes.problem import Problem, RecipeError
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe

__all__ = ["Problem", "Recipe", "RecipeError", "check", "load", "run", "shipped"]
