"""Recipes and experiments: schema, reading, overrides, writing. Imports no other package of fusedlm."""

from fusedlm.config.recipe import Recipe, dump_recipe, load_recipe, parse_recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe", "parse_recipe"]
