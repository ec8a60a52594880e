"""Dotted keys of a schema: their types, which do not change the results of a run, and differences of recipes."""

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Union, get_args, get_origin

from fusedlm.config.schema import NEUTRAL, Config

ABSENT = object()  # the value of a key that only the other tree has
NAME = "NAME"  # stands for the name of a block or a variant in dotted keys


@functools.cache
def neutral_keys(root: type[Config]) -> frozenset[str]:
    """The dotted keys that are marked NEUTRAL in the schema."""
    found = set()
    for name, field in root.model_fields.items():
        if NEUTRAL in field.metadata:
            found.add(name)
        for member in members(field.annotation):
            found |= {f"{name}.{key}" for key in neutral_keys(member)}
    return frozenset(found)


def is_neutral(key: str, root: type[Config]) -> bool:
    """Whether a dotted key, or one of its parents, is marked NEUTRAL."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in neutral_keys(root) for n in range(1, len(parts) + 1))


def differences(before, now, key: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, value before, value now) of each leaf that differs between two trees of plain values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(n for n in now if n not in before)]:
            inner = f"{key}.{name}" if key else name
            yield from differences(before.get(name, ABSENT), now.get(name, ABSENT), inner)
    elif before != now:
        yield key, before, now


def members(annotation) -> list[type[Config]]:
    """The configuration classes in an annotation, at any depth of unions, containers and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for argument in get_args(annotation) for member in members(argument)]


def alternatives(annotation) -> list:
    """The types that an annotation allows, without unions and Annotated; NoneType is one of them."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [one for argument in get_args(annotation) for one in alternatives(argument)]
    return [annotation]


def sections(found: Sequence) -> list[type[Config]]:
    """The configuration classes among types."""
    return [one for one in found if isinstance(one, type) and issubclass(one, Config)]


def below(found: Sequence, part: str) -> list:
    """The types of a key of these types: a field, or any name in a dictionary. Empty: they have no such key."""
    inner = []
    for one in found:
        if sections([one]):
            field = one.model_fields.get(part)
            inner += alternatives(field.annotation) if field else []
        elif get_origin(one) is dict:
            inner += alternatives(get_args(one)[1])
    return list(dict.fromkeys(inner))


def types_at(parts: Sequence[str], root: type[Config]) -> list:
    """The types of a dotted key, whatever types its sections have. Empty: there is no such key."""
    return functools.reduce(below, parts, [root])


@functools.cache
def dotted_keys(root: type[Config]) -> tuple[str, ...]:
    """All dotted keys, in the order of the schema, with NAME for the names of blocks and variants."""
    found = {}
    for name, field in root.model_fields.items():
        found[name] = None
        for one in alternatives(field.annotation):
            prefix = name
            if get_origin(one) is dict:
                prefix, one = f"{name}.{NAME}", get_args(one)[1]
            for section in sections(alternatives(one)):
                found |= {f"{prefix}.{key}": None for key in dotted_keys(section)}
    return tuple(found)
