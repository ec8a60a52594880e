"""Errors of one line with key and value, and the right key for a wrong one."""

import difflib
from typing import get_args, get_origin

import pydantic

from fusedlm.config.keys import alternatives, below, dotted_keys, sections, types_at
from fusedlm.config.messages import either, printable, shown
from fusedlm.config.schema import Config


def describe(error: pydantic.ValidationError, root: type[Config]) -> str:
    """The first error in one line: the dotted key, the value, the problem, and the nearest known name."""
    errors = error.errors(include_url=False)
    # First the unknown keys: a misspelt key also causes an error about a missing one.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    found, parts = _walk(first["loc"], root)
    location = ".".join(map(printable, parts))
    value = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        return f"{location}: unknown key{_hint(first['loc'], root)}"
    if kind == "missing":
        return f"{location}: required, but missing"
    if kind == "union_tag_invalid":
        context = first["ctx"]
        return f"{location}.type: {shown(first['input'].get('type'))} is not one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{location}.type: required, but missing; {_describe_types(value, sections(found))}"
    if kind == "value_error":
        message = str(first["ctx"]["error"])
    else:
        message = f"got {shown(value)}, {first['msg'][0].lower()}{first['msg'][1:]}"
    if first["loc"][-1:] == ("[key]",):
        message += _name_hint(parts, root)
    return f"{location}: {message}" if location else message


def suggest(key: str, root: type[Config]) -> list[str]:
    """Dotted keys that a wrong dotted key may have meant, the nearest first."""
    *above, name = key.split(".")
    beside = sorted({field for one in sections(types_at(above, root)) for field in one.model_fields})
    if nearest := _nearly(name, beside):
        return [".".join([*above, nearest])]
    elsewhere = [known for known in dotted_keys(root) if known.rpartition(".")[2] == name]
    if not elsewhere:
        names = {known.rpartition(".")[2] for known in dotted_keys(root)}
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
        elsewhere = [known for known in dotted_keys(root) if [known.rpartition(".")[2]] == nearest]
    in_section = [known for known in elsewhere if above and known.startswith(f"{above[0]}.")]
    return _outermost(in_section or elsewhere)


def _nearly(name: str, known: list[str]) -> str | None:
    """The known name that differs in about one letter, such as seeds for seed."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.85)), None)


def _outermost(keys: list[str]) -> list[str]:
    """Keys without those of sections inside the section of another one."""
    within = [f"{key.rpartition('.')[0]}." for key in keys if "." in key]
    return [key for key in keys if not any(key.startswith(one) and "." in key[len(one) :] for one in within)]


def _hint(location: tuple, root: type[Config]) -> str:
    """What an unknown key may have meant: one of another type of its section, of another section, or a similar one."""
    found, parts = _walk(location[:-1], root)
    name = str(location[-1])
    known = sorted({field for section in sections(found) for field in section.model_fields})
    of_types = [one for one in sections(types_at(parts, root)) if name in one.model_fields and _type_name(one)]
    if of_types:
        names = either([repr(one.model_fields["type"].default) for one in of_types])
        return f"; it is a key of type {names}; known here: {', '.join(known)}"
    if nearest := _nearly(name, known):
        return f"; did you mean {nearest!r}?"
    if name not in {key.rpartition(".")[2] for key in dotted_keys(root)}:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if nearest:
            return f"; did you mean {nearest[0]!r}?"
    elsewhere = [key for key in suggest(".".join([*parts, name]), root) if key.split(".")[:-1] != parts]
    return f"; did you mean {either(elsewhere)}?" if elsewhere else f"; known: {', '.join(known)}"


def _name_hint(parts: list[str], root: type[Config]) -> str:
    """For a key of a section that stands where the name of a block or a variant belongs."""
    meant = [key for key in suggest(".".join(parts), root) if key.rpartition(".")[2] == parts[-1]]
    return f"; did you mean {either(meant)}?" if meant else ""


def _describe_types(value, found: list[type[Config]]) -> str:
    names = {one.model_fields["type"].default: set(one.model_fields) for one in found}
    text = f"one of {', '.join(map(repr, names))}"
    fitting = [name for name, keys in names.items() if isinstance(value, dict) and set(value) <= keys]
    if value and 0 < len(fitting) < len(names):
        text += f"; {', '.join(map(printable, value))}: of {either(list(map(repr, fitting)))}"
    return text


def _walk(location: tuple, root: type[Config]) -> tuple[list, list[str]]:
    """The types at a pydantic location, and its parts without the discriminator tags that pydantic inserts."""
    found, readable = [root], []
    for part in location:
        inner = below(found, part) if isinstance(part, str) else []
        if not inner:
            tagged = [one for one in sections(found) if _type_name(one) == part]
            if tagged:
                found = tagged
                continue
        if part == "[key]":
            continue
        found = inner or [one for outer in found for one in _elements(outer)]
        readable.append(str(part))
    return found, readable


def _type_name(one: type[Config]) -> str | None:
    return one.model_fields["type"].default if "type" in one.model_fields else None


def _elements(one) -> list:
    return alternatives(get_args(one)[0]) if get_origin(one) is list else []
