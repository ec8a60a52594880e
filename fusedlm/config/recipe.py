"""A recipe: one YAML file that names everything about a run; overrides; round trip."""

import difflib
import re
from pathlib import Path
from typing import get_args

import pydantic
import yaml

from fusedlm.config.data import DataConfig
from fusedlm.config.model import ModelConfig
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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number (YAML 1.2; PyYAML follows 1.1) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is not text; put it in quotes")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `dotted.key=value`, the value read as YAML (`model.dim=256`, `train.ema=null`), applied in order.

    Raises:
        ValueError: the file cannot be read or is not a valid recipe; one line with the key, the value and the way out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path}: not UTF-8 text (byte {error.start})") from None
    try:
        return parse_recipe(text, overrides)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None


def parse_recipe(text: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The same from YAML text."""
    tree = _parse_yaml(text)
    if not isinstance(tree, dict):
        raise ValueError("expected keys such as name, model, data and train at the top level")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(_describe(error)) from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML of the fully resolved recipe; `parse_recipe` of it gives an equal object."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _parse_yaml(text: str):
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("YAML is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise ValueError(f"YAML {where}{problem}") from None


def _apply_override(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ValueError(f"override {override!r} is not of the form key.path=value, such as train.steps=100")
    for depth, part in enumerate(parts[:-1]):
        if tree.get(part) is None:
            # What is left out is of the default type where that has the key that the override changes.
            default = _default_at(parts[: depth + 1])
            tree[part] = {"type": default.type} if {"type", parts[depth + 1]} <= _field_names(default) else {}
        tree = tree[part]
        if not isinstance(tree, dict):
            above = ".".join(parts[: depth + 1])
            raise ValueError(f"override {override!r}: {above} is a value and has no keys of its own")
    try:
        tree[parts[-1]] = _parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from None


def _default_at(parts: list[str]):
    """The default of a dotted key; None where it has none."""
    fields = [c.model_fields[parts[-1]] for c in _walk(tuple(parts[:-1]))[0] if parts[-1] in c.model_fields]
    return fields[0].default if len(fields) == 1 else None


def _field_names(value) -> set[str]:
    return set(type(value).model_fields) if isinstance(value, Config) else set()


def _describe(error: pydantic.ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelt key is often also a missing one; the spelling says more.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = _readable(first["loc"])
    value = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        nearest = difflib.get_close_matches(str(first["loc"][-1]), _keys_at(first["loc"][:-1]), n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(_keys_at(first['loc'][:-1]))}"
        return f"{location}: unknown key{hint}"
    if kind == "missing":
        return f"{location}: required, but not given"
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{location}: {message}" if location else message
    if kind == "union_tag_invalid":
        context = first["ctx"]
        return f"{location}.type: {context['tag']!r} is not one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        types = [c.model_fields["type"].default for c in _walk(first["loc"])[0]]
        return f"{location}: type is required, but not given; one of {', '.join(map(repr, types))}"
    message = first["msg"][0].lower() + first["msg"][1:]
    if isinstance(value, dict | list):
        value = type(value).__name__
    return f"{location}: got {value!r}, {message}"


def _members(annotation) -> list[type[Config]]:
    """Every configuration class that an annotation admits, however deep in unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for argument in get_args(annotation) for member in _members(argument)]


def _walk(location: tuple) -> tuple[list[type[Config]], list[str]]:
    """The classes at a pydantic location and its parts without the discriminator tags that pydantic puts in."""
    classes, readable = [Recipe], []
    for part in location:
        fields = [c.model_fields[part] for c in classes if part in c.model_fields]
        if fields:
            classes = [member for field in fields for member in _members(field.annotation)]
        else:
            tagged = [c for c in classes if "type" in c.model_fields and c.model_fields["type"].default == part]
            if tagged:
                classes = tagged
                continue
        readable.append(str(part))
    return classes, readable


def _readable(location: tuple) -> str:
    return ".".join(_walk(location)[1])


def _keys_at(location: tuple) -> list[str]:
    return sorted({name for c in _walk(location)[0] for name in c.model_fields})
