"""Shared by recipes and experiments: YAML, `key=value` overrides, and errors of one line with key and value."""

import difflib
import re
from pathlib import Path
from typing import get_origin

import pydantic
import yaml

from fusedlm.config.keys import members
from fusedlm.config.schema import Config


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number (YAML 1.2; PyYAML follows 1.1) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is not a string; put it in quotes")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_text(kind: str, path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError with the kind of file (`recipe`), the path and the reason."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{kind} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind} {path}: not UTF-8 text (byte {error.start})") from None


def parse_yaml(text: str):
    """The tree of YAML text. Raises ValueError with line and column."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("YAML is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise ValueError(f"YAML {where}{problem}") from None


def apply_override(tree: dict, override: str, root: type[Config]) -> None:
    """Set `dotted.key=value` in a tree that `root` will validate. The value is read as YAML."""
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ValueError(f"override {override!r}: must have the form key.path=value, such as train.steps=100")
    for depth, part in enumerate(parts[:-1]):
        if tree.get(part) is None:
            # A missing section has the default type if that type has the key.
            default = _default_at(parts[: depth + 1], root)
            tree[part] = {"type": default.type} if {"type", parts[depth + 1]} <= _field_names(default) else {}
        tree = tree[part]
        if not isinstance(tree, dict):
            above = ".".join(parts[: depth + 1])
            raise ValueError(f"override {override!r}: {above} is a value, not a section")
    try:
        tree[parts[-1]] = parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from None


def _default_at(parts: list[str], root: type[Config]):
    """The default of a dotted key; None if it has none."""
    fields = [c.model_fields[parts[-1]] for c in _walk(tuple(parts[:-1]), root)[0] if parts[-1] in c.model_fields]
    return fields[0].default if len(fields) == 1 else None


def _field_names(value) -> set[str]:
    return set(type(value).model_fields) if isinstance(value, Config) else set()


def describe(error: pydantic.ValidationError, root: type[Config]) -> str:
    """The first error in one line: the dotted key, the value, the problem, and the nearest known name."""
    errors = error.errors(include_url=False)
    # First the unknown keys: a misspelt key also causes an error about a missing one.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = _readable(first["loc"], root)
    value = first.get("input")
    kind = first["type"]
    if kind == "extra_forbidden":
        return f"{location}: unknown key{_hint(first['loc'], root)}"
    if kind == "missing":
        return f"{location}: required, but missing"
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{location}: {message}" if location else message
    if kind == "union_tag_invalid":
        context = first["ctx"]
        return f"{location}.type: {context['tag']!r} is not one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        types = [c.model_fields["type"].default for c in _walk(first["loc"], root)[0]]
        return f"{location}.type: required, but missing; one of {', '.join(map(repr, types))}"
    message = first["msg"][0].lower() + first["msg"][1:]
    if isinstance(value, dict | list):
        value = type(value).__name__
    return f"{location}: got {value!r}, {message}"


def _hint(location: tuple, root: type[Config]) -> str:
    """A suggestion for an unknown key: a key of the same name in another section, or a similar one in the same."""
    name, known = str(location[-1]), _keys_at(location[:-1], root)
    elsewhere = [key for key in _dotted_keys(root) if key.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return f"; did you mean {elsewhere[0]}?"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"


def _dotted_keys(root: type[Config]) -> set[str]:
    """All dotted keys, except those inside dictionaries of sections."""
    found = set()
    for name, field in root.model_fields.items():
        found.add(name)
        if get_origin(field.annotation) is not dict:
            found |= {f"{name}.{key}" for member in members(field.annotation) for key in _dotted_keys(member)}
    return found


def _walk(location: tuple, root: type[Config]) -> tuple[list[type[Config]], list[str]]:
    """The classes at a pydantic location, and its parts without the discriminator tags that pydantic inserts."""
    classes, readable = [root], []
    for part in location:
        fields = [c.model_fields[part] for c in classes if part in c.model_fields]
        if fields:
            classes = [member for field in fields for member in members(field.annotation)]
        else:
            tagged = [c for c in classes if "type" in c.model_fields and c.model_fields["type"].default == part]
            if tagged:
                classes = tagged
                continue
        readable.append(str(part))
    return classes, readable


def _readable(location: tuple, root: type[Config]) -> str:
    return ".".join(_walk(location, root)[1])


def _keys_at(location: tuple, root: type[Config]) -> list[str]:
    return sorted({name for c in _walk(location, root)[0] for name in c.model_fields})
