"""Recipes: each file is a run that `python -m casc.recipes.NAME` starts."""
