"""An experiment: variants of one recipe, over seeds, with one quantity matched among them."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from fusedlm.config.errors import describe
from fusedlm.config.messages import printable, shown
from fusedlm.config.overrides import apply_override, is_text_key
from fusedlm.config.reading import parse_yaml, read_text
from fusedlm.config.recipe import Recipe, parse_recipe
from fusedlm.config.schema import Config, Count, Length, PathText, Seed, ShortName, Text, TypeText
from fusedlm.config.writing import dump_yaml, inline_yaml

MAX_SEEDS = MAX_OVERRIDES = 1000
MAX_FACTORS = 100

Override = Annotated[str, Field(max_length=100_000), TypeText("key=value")]
VariantOverrides = Annotated[list[Override], Field(max_length=MAX_OVERRIDES)]

PREFIX = "experiment."  # on the command line, of keys that change the experiment; others change the base recipe

# Keys of a recipe that the experiment sets, and the keys of the experiment that set them.
DECIDED = {"name": f"{PREFIX}name", "train.seed": f"{PREFIX}seeds"}


class TuneConfig(Config):
    """Trials of the learning rate of each variant before its runs, as many for every variant."""

    lr_factors: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(
        [0.5, 1.0, 2.0], min_length=1, max_length=MAX_FACTORS
    )
    """Factors of all peak learning rates of a variant, each tried once; its runs use the one with the lowest final
    validation loss."""
    seed: Seed = 1000
    """Seed of all trials; none of experiment.seeds."""
    steps: Count | None = None
    """Steps of a trial of the baseline, with a complete schedule, and of other variants in proportion to their steps;
    null: those of a run."""

    @model_validator(mode="after")
    def _check(self):
        if len(set(self.lr_factors)) != len(self.lr_factors):
            raise ValueError(f"lr_factors={self.lr_factors}: a factor is repeated; remove it")
        return self


class Experiment(Config):
    """Variants × seeds of a base recipe.

    Overrides are `dotted.key=value`, as on the command line. In a file they can also be a mapping from dotted keys to
    values.
    """

    name: ShortName
    """Name of the experiment, and of its folder unless another is given."""
    description: Text = ""
    """What the experiment is for."""
    base: PathText
    """Path of a recipe; in a file, relative to that file."""
    overrides: list[Override] = Field([], max_length=MAX_OVERRIDES)
    """Overrides of the base recipe, for every variant."""
    variants: dict[ShortName, VariantOverrides] = Field(min_length=1, max_length=1000)
    """Overrides of the base recipe, by the name of the variant; the first is the baseline."""
    seeds: list[Seed] = Field([0], min_length=1, max_length=MAX_SEEDS)
    """Seeds of the weights and of the order of the text; an integer n means 0 to n - 1."""
    match: Literal["none", "params", "flops", "tokens", "time"] = "none"
    """The quantity that is made equal to the baseline's in all variants."""
    match_by: Literal["ffn", "width", "depth"] = "ffn"
    """What is changed to match params and flops: hidden width of the feed-forwards, model.dim or model.n_layers."""
    tolerance: float = Field(0.01, gt=0, le=0.1)
    """Largest relative deviation of the match."""
    calibration_steps: int = Field(40, ge=10, le=10**6)
    """Steps that measure the time per step of a variant, for match: time."""
    tune: TuneConfig | None = None
    """Trials of the learning rate of each variant before its runs; null: none."""
    weights: Literal["raw", "ema", "swa"] = "raw"
    """Weights of each run that are scored: as trained, their moving average, or their mean near the end."""
    decode_lengths: list[Length] = Field([1024, 8192, 65536], max_length=100)
    """Numbers of tokens after which decoding is measured; []: not measured."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _list_overrides(cls, value):
        return _as_list(value)

    @field_validator("variants", mode="before")
    @classmethod
    def _list_variants(cls, value):
        if not isinstance(value, dict):
            return value
        lower = [str(name).lower() for name in value]
        if twice := [name for name in value if lower.count(str(name).lower()) > 1]:
            raise ValueError(f"{twice} differ in case only, and some file systems take them for one folder; rename one")
        return {name: _as_list(entry) for name, entry in value.items()}

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_seeds(cls, value):
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if value < 1:
            raise ValueError(f"got {value}, a number of seeds must be at least 1; or give a list such as [0, 1, 2]")
        if value > MAX_SEEDS:
            raise ValueError(f"got {value}, a number of seeds must be at most {MAX_SEEDS}")
        return list(range(value))

    @model_validator(mode="after")
    def _check(self):
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: a seed is repeated; remove it")
        if self.tune is not None and self.tune.seed in self.seeds:
            raise ValueError(
                f"tune.seed={self.tune.seed}: one of seeds, whose runs are reported; tune with a seed that is not"
            )
        if sorted(set(self.decode_lengths)) != self.decode_lengths:
            raise ValueError(f"decode_lengths={self.decode_lengths}: must be increasing")
        named = {"overrides": self.overrides} | {f"variants.{name}": own for name, own in self.variants.items()}
        for where, overrides in named.items():
            for override in overrides:
                _check_decided(override, where)
        return self


def load_experiment(
    path: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[Experiment, dict[str, Recipe]]:
    """Read an experiment and its base recipe.

    Args:
        path: a YAML file.
        overrides: `experiment.key=value` changes the experiment (`experiment.seeds=[0]`); any other `key=value` changes
            the base recipe and so every variant (`train.steps=100`).

    Returns:
        The experiment, with `base` relative to the working directory and with the overrides of the recipe; and the
        recipe of each variant with the first seed, before anything is matched.

    Raises:
        ValueError: a file cannot be read, a key or value is not valid, or a variant sets a key that the command line
            sets too; one line with the key, the value and the fix.
    """
    text = read_text("experiment", path)
    try:
        experiment = _parse(text, Path(path).parent, overrides)
    except ValueError as error:
        raise ValueError(f"experiment {path}: {error}") from None
    base = read_text(f"experiment {path}: base recipe", experiment.base)
    recipes = {name: _variant(path, experiment, base, name) for name in experiment.variants}
    for name, recipe in recipes.items():
        for factor in experiment.tune.lr_factors if experiment.tune else ():
            try:
                scale_rates(recipe, factor)
            except ValueError as error:
                raise ValueError(f"experiment {path}: variant {name}: tune.lr_factors: {error}") from None
    return experiment, recipes


def scale_rates(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with all peak learning rates times a factor.

    Raises:
        ValueError: a rate is then out of bounds; names it.
    """
    optimizer = recipe.train.optimizer
    if factor == 1:
        return recipe
    scaled = optimizer.with_lr(factor * next(iter(optimizer.rates().values())))
    try:
        scaled = type(optimizer).model_validate(scaled.model_dump())
    except pydantic.ValidationError as error:
        raise ValueError(f"{factor:g}: train.optimizer.{describe(error, type(optimizer))}") from None
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"optimizer": scaled})})


def dump_experiment(experiment: Experiment) -> str:
    """The resolved experiment as YAML."""
    return dump_yaml(experiment.model_dump(mode="json"))


def run_name(variant: str, seed: int, factor: float | None = None) -> str:
    """Name of a run's folder, or of a trial's: that of a factor of the learning rates."""
    return f"{variant}-seed{seed}" if factor is None else f"{variant}-lrx{repr(float(factor)).removesuffix('.0')}"


def _parse(text: str, folder: Path, overrides) -> Experiment:
    tree = parse_yaml(text)
    if not isinstance(tree, dict):
        raise ValueError("expected keys such as name, base, variants and seeds at the top level")
    of_recipes = []
    for override in overrides:
        if override.startswith(PREFIX):
            apply_override(tree, override.removeprefix(PREFIX), Experiment)
        else:
            _check_recipe_override(override)
            of_recipes.append(override)
    try:
        experiment = Experiment.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(describe(error, Experiment)) from None
    for override in of_recipes:
        _check_reaches(override, experiment.variants)
    changes = {"base": str(folder / experiment.base), "overrides": [*experiment.overrides, *of_recipes]}
    return experiment.model_copy(update=changes)


def _variant(path, experiment: Experiment, base: str, name: str) -> Recipe:
    overrides = [
        *experiment.overrides,
        *experiment.variants[name],
        f"name={experiment.name}-{run_name(name, experiment.seeds[0])}",
        f"train.seed={experiment.seeds[0]}",
    ]
    try:
        return parse_recipe(base, overrides)
    except ValueError as error:
        raise ValueError(f"experiment {path}: variant {name} of {printable(experiment.base, 300)}: {error}") from None


def _as_list(value):
    if value is None:
        return []
    if not isinstance(value, dict):
        return value
    for key, entry in value.items():
        if entry is not None and not isinstance(entry, str) and is_text_key(key, Recipe):
            raise ValueError(f"{printable(key)}: got {shown(entry)}, must be text; put it in quotes")
    return [f"{key}={inline_yaml(entry)}" for key, entry in value.items()]


def _check_recipe_override(override: str) -> None:
    key = override.partition("=")[0]
    first = key.split(".")[0]
    if key in DECIDED:
        _check_decided(override, "the command line")
    if first in Experiment.model_fields and first not in Recipe.model_fields:
        raise ValueError(
            f"override {shown(override)}: recipes have no such key; the key of the experiment is {PREFIX}{key}"
        )


def _check_decided(override: str, where: str) -> None:
    key = override.partition("=")[0]
    if key in DECIDED:
        raise ValueError(
            f"{where}: {shown(override)} is not allowed, since the experiment sets {key}; use {DECIDED[key]}"
        )


def _check_reaches(override: str, variants: dict[str, list[str]]) -> None:
    """Refuse an override of the command line that an override of one variant would undo."""
    key = override.partition("=")[0]
    for name, own in variants.items():
        for other in own:
            other_key = other.partition("=")[0]
            if f"{key}.".startswith(f"{other_key}."):
                raise ValueError(
                    f"override {shown(override)}: does not reach variant {name}, which sets {other_key} itself; use "
                    f"{PREFIX}variants.{name}=[...]"
                )
