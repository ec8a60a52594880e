"""`dotted.key=value` overrides of a tree that a schema will validate."""

from typing import Literal, get_args, get_origin

from yaml.nodes import ScalarNode

from fusedlm.config.keys import types_at
from fusedlm.config.messages import shown
from fusedlm.config.reading import compose, parse_yaml
from fusedlm.config.schema import Config

_MAX_PARTS = 30  # of a key


def apply_override(tree: dict, override: str, root: type[Config]) -> None:
    """Set `dotted.key=value` in a tree that `root` will validate.

    A value of a text key is the text after `=` as it stands, without quotes if it is one quoted string, and None if it
    is `null` and the key can be null. Any other value is YAML.

    Raises:
        ValueError: the override has another form, or the value is not YAML; one line.
    """
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > _MAX_PARTS:
        raise ValueError(f"override {shown(override)}: must have the form key.path=value, such as train.steps=100")
    for depth, part in enumerate(parts[:-1]):
        if tree.get(part) is None:
            # A missing section has the default type if that type has the key.
            default = _default_at(parts[: depth + 1], root)
            tree[part] = {"type": default.type} if {"type", parts[depth + 1]} <= _field_names(default) else {}
        tree = tree[part]
        if not isinstance(tree, dict):
            above = ".".join(parts[: depth + 1])
            raise ValueError(f"override {shown(override)}: {above} is a value, not a section")
    try:
        tree[parts[-1]] = _read(key, value, root)
    except ValueError as error:
        raise ValueError(f"override {shown(override)}: {str(error).removeprefix('line 1: ')}") from None


def is_text_key(key: str, root: type[Config]) -> bool:
    """Whether the values of a dotted key are strings, whatever types its sections have. An unknown key is: it keeps its
    text, so that the schema names the key and not a fault of the value."""
    types = types_at(key.split("."), root)
    return all(_is_text(one) for one in types if one is not type(None))


def _read(key: str, value: str, root: type[Config]):
    if not is_text_key(key, root):
        return parse_yaml(value)
    if value == "null" and type(None) in types_at(key.split("."), root):
        return None
    return _unquote(value)


def _is_text(one) -> bool:
    if get_origin(one) is Literal:
        return all(isinstance(choice, str) for choice in get_args(one))
    return one is str


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return value
    try:
        node = compose(value)
    except ValueError:  # text that begins and ends with a quote, such as 'a' and 'b'
        return value
    is_one_string = isinstance(node, ScalarNode) and node.style == value[0] and node.end_mark.index == len(value)
    return node.value if is_one_string else value


def _default_at(parts: list[str], root: type[Config]):
    """The default of a dotted key; None if it has none."""
    holders = [one for one in types_at(parts[:-1], root) if hasattr(one, "model_fields")]
    fields = [one.model_fields[parts[-1]] for one in holders if parts[-1] in one.model_fields]
    return fields[0].default if len(fields) == 1 else None


def _field_names(value) -> set[str]:
    return set(type(value).model_fields) if isinstance(value, Config) else set()
