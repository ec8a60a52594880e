"""A recipe: one YAML file that defines a run."""

from pathlib import Path
from typing import Annotated

import pydantic
from pydantic import model_validator

from fusedlm.config.data import DataConfig
from fusedlm.config.errors import describe
from fusedlm.config.messages import shown
from fusedlm.config.model import ModelConfig
from fusedlm.config.overrides import apply_override
from fusedlm.config.reading import parse_yaml, read_text
from fusedlm.config.runtime import RuntimeConfig
from fusedlm.config.schema import NEUTRAL, Config, Name, Text
from fusedlm.config.train import TrainConfig
from fusedlm.config.writing import dump_yaml


class Recipe(Config):
    """Everything that defines a run."""

    name: Name
    """Name of the run, and of its folder unless another is given."""
    description: Annotated[Text, NEUTRAL] = ""
    """What the recipe is for."""
    model: ModelConfig
    """The decoder."""
    data: DataConfig = DataConfig()
    """The text, its split, its tokenizer, its shards."""
    train: TrainConfig
    """Budget, optimizer, schedule, validation, checkpoints."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device, precision and kernels."""
    sample_prompt: Annotated[Text, NEUTRAL] = "The "
    """Prompt of the sample at the end of training."""

    @model_validator(mode="after")
    def _check(self):
        self.data.stage_ends(self.train.total_tokens())
        key, head_lr = self.train.optimizer.head_rate
        if head_lr is not None and self.model.tie_embeddings:
            raise ValueError(
                f"train.optimizer.{key}={head_lr}: the head is the token embedding; set model.tie_embeddings=false "
                "or remove it"
            )
        if self.model.mup is not None and self.train.optimizer.type == "sgd":
            raise ValueError("train.optimizer.type=sgd: model.mup has no rule for it; use adamw, or remove model.mup")
        if self.train.distill is not None:
            depth = 0 if self.model.mtp is None else self.model.mtp.depth
            if depth:
                raise ValueError(
                    f"train.distill: has no soft targets for the modules of model.mtp.depth={depth}; "
                    "set model.mtp=null or train.distill=null"
                )
            if self.runtime.cuda_graph:
                raise ValueError(
                    "runtime.cuda_graph=true: train.distill runs the teacher outside of the graph; set "
                    "runtime.cuda_graph=false"
                )
        self._check_experts()
        matrix = getattr(self.train.optimizer, "matrix", None)
        if self.model.mup is not None and matrix is not None and matrix.scaling != "spectral":
            raise ValueError(
                f"train.optimizer.matrix.scaling={matrix.scaling}: model.mup goes with spectral alone; set it, or "
                "remove model.mup"
            )
        return self

    def _check_experts(self) -> None:
        """Raises ValueError if runtime.parallel.experts does not divide the experts of the model."""
        key = f"runtime.parallel.experts={self.runtime.parallel.experts}"
        if self.runtime.parallel.experts == 1:
            return
        mixtures = self.model.mixtures()
        if not mixtures:
            raise ValueError(f"{key}: the model has no mixture of experts to divide; set runtime.parallel.experts=1")
        for name, ffn in mixtures.items():
            if ffn.n_experts % self.runtime.parallel.experts:
                raise ValueError(
                    f"{key}: does not divide model.blocks.{name}.ffn.n_experts={ffn.n_experts}; set a divisor of it"
                )


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, applied in order. A value of a text key is the text as it stands, any other is
            read as YAML (`sample_prompt=a: b`, `model.dim=256`, `train.ema=null`).

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
            raise ValueError(f"override {shown(override)}: only keys of section {section} can be changed here")
    return parse_recipe(dump_recipe(recipe), overrides)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse_recipe` reads it back to an equal object."""
    return dump_yaml(recipe.model_dump(mode="json"))
