"""What the schema says about each key, for people: type, default and meaning."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fusedlm.config.errors import suggest
from fusedlm.config.experiment import PREFIX, Experiment
from fusedlm.config.keys import NAME, alternatives, dotted_keys, sections, types_at
from fusedlm.config.messages import either, printable
from fusedlm.config.recipe import Recipe
from fusedlm.config.schema import NEUTRAL, Config, TypeText
from fusedlm.config.writing import inline_yaml

REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    name: str  # without the section
    type: str  # such as `integer from 1 to 1,024`
    default: str  # as YAML; REQUIRED if there is none
    meaning: str


@dataclass(frozen=True)
class Section:
    """A section, or one type of a section with several."""

    type: str | None
    meaning: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Place:
    """Where sections stand: their dotted key, `` for the top level, and the sections, one per type."""

    key: str
    sections: tuple[Section, ...]


def root_of(key: str) -> tuple[type[Config], list[str]]:
    """The schema that a dotted key belongs to, and its parts there: keys of experiments begin with `experiment`."""
    parts = key.split(".") if key else []
    if parts[:1] == [PREFIX.removesuffix(".")]:
        return Experiment, parts[1:]
    return Recipe, parts


@functools.cache
def places() -> tuple[Place, ...]:
    """All sections of recipes and experiments, in the order of the schema."""
    found = []
    for root, prefix in ((Recipe, ""), (Experiment, PREFIX)):
        found.append(Place(prefix.removesuffix("."), (section(root),)))
        for key in dotted_keys(root):
            for name in (key, f"{key}.{NAME}"):
                if held := sections(types_at(name.split("."), root)):
                    found.append(Place(f"{prefix}{name}", tuple(map(section, held))))
    return tuple(found)


@functools.cache
def section(config: type[Config]) -> Section:
    type_field = config.model_fields.get("type")
    keys = tuple(key_of(name, field) for name, field in config.model_fields.items())
    return Section(type_field and type_field.default, " ".join(cleandoc(config.__doc__ or "").split()), keys)


def key_of(name: str, field: FieldInfo) -> Key:
    meaning = " ".join(cleandoc(field.description or "").split())
    if NEUTRAL in field.metadata:
        meaning += " Can be changed when a run is resumed."
    return Key(name, type_text(field.annotation, field.metadata), _default_text(name, field), meaning)


def type_text(annotation, metadata: Iterable = ()) -> str:
    """A type with its constraints, in words."""
    constraints = [one for entry in metadata for one in getattr(entry, "metadata", None) or [entry]]
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        return type_text(inner, [*own, *constraints])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"list, each {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping from {type_text(arguments[0])} to {type_text(arguments[1])}"
    if arguments:  # a union
        texts = [type_text(one, constraints) for one in arguments if one is not type(None)]
        types = [one.model_fields["type"].default for one in sections(alternatives(annotation)) if len(texts) > 1]
        text = f"section of type {', '.join(types)}" if types else texts[0]
        return f"{text}, or null" if type(None) in arguments else text
    if sections([annotation]):
        return "section"
    words = [one.text for one in constraints if isinstance(one, TypeText)]
    if words:
        return words[0]
    return {bool: "true or false", str: "text"}.get(annotation) or _number_text(annotation, constraints)


def _number_text(kind: type, constraints: list) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    bounds = {name: getattr(one, name) for one in constraints for name in words if hasattr(one, name)}
    if kind is int and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if kind is int and "lt" in bounds:
        bounds["le"] = bounds.pop("lt") - 1
    name = "integer" if kind is int else "number"
    if {"ge", "le"} <= set(bounds):
        return f"{name} from {_digits(bounds['ge'])} to {_digits(bounds['le'])}"
    return ", ".join([name, *(f"{words[one]} {_digits(bound)}" for one, bound in bounds.items())])


def _digits(number: float) -> str:
    if number == int(number) and number < 1e6:
        number = int(number)
    return f"{number:,}" if isinstance(number, int) else re.sub(r"e\+?(-?)0*", r"e\1", f"{number:g}")


def _default_text(name: str, field: FieldInfo) -> str:
    default = field.default
    if field.is_required() or name == "type":
        return REQUIRED
    if isinstance(default, Config):
        return getattr(default, "type", "all defaults")
    if isinstance(default, str) and re.fullmatch(r"\w+", default):
        return default
    return inline_yaml(default)


@dataclass(frozen=True)
class Found:
    """A key, or a section of one type, that a dotted key names."""

    title: str
    key: Key | None = None
    section: Section | None = None


def look_up(name: str) -> list[Found]:
    """What a dotted key names: the key in each type of its section, then the sections at it, one per type.

    Args:
        name: `train.optimizer`, `train.optimizer.lr`, `train.optimizer.sgd` (one type), `experiment.seeds`; any name
            of a block.

    Raises:
        ValueError: there is no such key; names the nearest ones.
    """
    root, parts = root_of(name)
    above, last = parts[:-1], parts[-1] if parts else ""
    outer = [section(one) for one in sections(types_at(above, root))] if parts else []
    inner = [section(one) for one in sections(types_at(parts, root))]
    if outer and not inner:
        inner = [one for one in outer if one.type == last]
    holders = [(one.type, key) for one in outer for key in one.keys if key.name == last]
    if not holders and not inner:
        prefix = name[: len(name) - len(".".join(parts))]
        hint = [prefix + key for key in suggest(".".join(parts), root)]
        outermost = [place.key for place in places()[1:] if place.key.count(".") < 2]
        known = [key.name for one in outer[:1] for key in one.keys] or outermost
        hint = f"did you mean {either(hint)}?" if hint else f"known: {', '.join(known)}"
        raise ValueError(f"{printable(name)}: no such key; {hint}")
    if len(inner) == 1:  # it says all that its key does
        holders = []
    keys = {}  # types whose key is the same are one entry
    for of_type, key in holders:
        keys.setdefault(key, []).append(of_type)
    found = [Found(_title(name, types if len(keys) > 1 else []), key=key) for key, types in keys.items()]
    return found + [Found(_title(name, [one.type] if one.type != last else []), section=one) for one in inner]


def _title(name: str, types: list[str | None]) -> str:
    shown = ", ".join(filter(None, types))
    return f"{name} (type {shown})" if shown else name
