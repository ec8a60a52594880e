"""Recipes: the schema, reading, overriding and writing them. Imports nothing else of fusedlm."""

from fusedlm.config.recipe import Recipe, dump_recipe, load_recipe, parse_recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe", "parse_recipe"]
