"""A recipe: one YAML file that defines a run."""

from pathlib import Path
from typing import Annotated

import pydantic
import yaml

from fusedlm.config.data import DataConfig
from fusedlm.config.model import ModelConfig
from fusedlm.config.reading import apply_override, describe, parse_yaml, read_text
from fusedlm.config.runtime import RuntimeConfig
from fusedlm.config.schema import NEUTRAL, Config
from fusedlm.config.train import TrainConfig


class Recipe(Config):
    """Everything that defines a run."""

    name: str = pydantic.Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    description: Annotated[str, NEUTRAL] = ""
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    runtime: RuntimeConfig = RuntimeConfig()
    sample_prompt: Annotated[str, NEUTRAL] = "The "  # of the sample at the end of training


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value read as YAML (`model.dim=256`, `train.ema=null`), applied in order.

    Raises:
        ValueError: the file cannot be read or is not a valid recipe; one line with the key, the value and the fix.
    """
    text = read_text("recipe", path)
    try:
        return parse_recipe(text, overrides)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None


def parse_recipe(text: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from YAML text; as `load_recipe`."""
    tree = parse_yaml(text)
    if not isinstance(tree, dict):
        raise ValueError("expected keys such as name, model, data and train at the top level")
    for override in overrides:
        apply_override(tree, override, Recipe)
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(describe(error, Recipe)) from None


def with_overrides(recipe: Recipe, overrides: list[str] | tuple[str, ...], section: str) -> Recipe:
    """A recipe with overrides `section.key=value` of one section.

    Raises:
        ValueError: an override is of another section, or not valid.
    """
    if not overrides:
        return recipe
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise ValueError(f"override {override!r}: only keys of section {section} can be changed here")
    return parse_recipe(dump_recipe(recipe), overrides)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse_recipe` reads it back to an equal object."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
