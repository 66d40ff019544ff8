"""Recipes: the typed description of a run, its loader, and the recipes that ship."""
