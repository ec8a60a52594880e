"""Keys that do not change the results of a run, and the differences between two recipes."""

import functools
from collections.abc import Iterator
from typing import get_args

from fusedlm.config.schema import NEUTRAL, Config

ABSENT = object()  # the value of a key that only the other tree has


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
    """The configuration classes in an annotation, at any depth of unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for argument in get_args(annotation) for member in members(argument)]
