"""A recipe: one YAML file that names everything about a run; overrides; round trip."""

from pathlib import Path

import pydantic
import yaml

from fusedlm.config.data import DataConfig
from fusedlm.config.model import ModelConfig
from fusedlm.config.reading import apply_override, describe, parse_yaml, read_text
from fusedlm.config.schema import Config
from fusedlm.config.train import TrainConfig


class Recipe(Config):
    """Everything that decides the outcome of a run."""

    name: str = pydantic.Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    sample_prompt: str = "The "  # what the sample at the end of training continues


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value read as YAML (`model.dim=256`, `train.ema=null`), applied in order.

    Raises:
        ValueError: the file cannot be read or is not a valid recipe; one line with the key, the value and the way out.
    """
    text = read_text("recipe", path)
    try:
        return parse_recipe(text, overrides)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None


def parse_recipe(text: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The same from YAML text."""
    tree = parse_yaml(text)
    if not isinstance(tree, dict):
        raise ValueError("expected keys such as name, model, data and train at the top level")
    for override in overrides:
        apply_override(tree, override, Recipe)
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(describe(error, Recipe)) from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the fully resolved recipe; `parse_recipe` of it gives an equal object."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
