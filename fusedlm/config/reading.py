"""YAML text to a tree of plain values, in bounded time and memory."""

from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fusedlm.config import scalars
from fusedlm.config.messages import printable, shown

MAX_TEXT = 2**20  # bytes of a file, characters of a text; a recipe has some thousand
MAX_VALUES = 20_000
MAX_DEPTH = 50

_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


class CoreSchema:
    """Makes a PyYAML loader or dumper resolve plain scalars as `fusedlm.config.scalars` does."""

    def resolve(self, kind, value, implicit):
        if kind is ScalarNode:
            return scalars.plain_tag(value) if implicit[0] else scalars.STR
        return _SEQ if kind is SequenceNode else _MAP


class _Loader(CoreSchema, yaml.SafeLoader):
    """Composes nodes, of which `_Builder` makes values."""

    def __init__(self, text: str):
        super().__init__(text)
        self._left, self._depth = MAX_VALUES, 0

    def compose_node(self, parent, index):
        self._left -= 1
        self._depth += 1
        if self._left < 0:
            raise ValueError(f"YAML has more than {MAX_VALUES} values")
        if self._depth > MAX_DEPTH:
            raise ValueError(f"YAML is nested too deeply, in more than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Builder:
    """Values of nodes. An alias is a copy of its anchor, so that changing one does not change the other."""

    def __init__(self):
        self._values, self._characters = MAX_VALUES, MAX_TEXT
        self._open: list[Node] = []

    def build(self, node: Node):
        self._values -= 1
        self._characters -= len(node.value) if isinstance(node, ScalarNode) else 0
        if self._values < 0 or self._characters < 0:
            raise ValueError(f"YAML aliases expand to more than {MAX_VALUES} values or {MAX_TEXT} characters")
        if isinstance(node, ScalarNode):
            return _at(node, scalars.value, node.tag, node.value)
        if node.tag not in (_MAP, _SEQ) or (node.tag == _MAP) != isinstance(node, MappingNode):
            _fail(node, scalars.unknown_tag(node.tag))
        if any(node is outer for outer in self._open):
            _fail(node, "an alias contains itself")
        if len(self._open) >= MAX_DEPTH:
            raise ValueError(f"YAML aliases are nested too deeply, in more than {MAX_DEPTH} levels")
        self._open.append(node)
        result = self._mapping(node) if isinstance(node, MappingNode) else [self.build(child) for child in node.value]
        self._open.pop()
        return result

    def _mapping(self, node: MappingNode) -> dict:
        """Merged keys (`<<`) come where they are merged; those of the mapping itself win, then those merged first."""
        own = {}
        for key_node, child in node.value:
            key = self._key(key_node)
            if key in own:
                _fail(key_node, f"key {shown(key)} is given twice")
            own[key] = key_node, child
        result = {}
        for key, (key_node, child) in own.items():
            if key_node.tag != scalars.MERGE:
                result[key] = self.build(child)
                continue
            for merged in self._merged(child):
                result |= {k: v for k, v in merged.items() if k not in result and (k not in own or k == key)}
        return result

    def _key(self, node: Node) -> str:
        key = _at(node, scalars.value, node.tag, node.value) if isinstance(node, ScalarNode) else None
        if not isinstance(key, str):
            what = shown(key) if isinstance(node, ScalarNode) else "of a list or mapping"
            _fail(node, f"key {what} is not a string; put it in quotes")
        return key

    def _merged(self, node: Node) -> list[dict]:
        found = self.build(node)
        found = found if isinstance(found, list) else [found]
        if not all(isinstance(mapping, dict) for mapping in found):
            _fail(node, "<< merges a mapping, or a list of mappings")
        return found


def read_text(kind: str, path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError with the kind of file (`recipe`), the path and the reason."""
    where = f"{kind} {printable(str(path), 300)}"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise ValueError(f"{where}: larger than {MAX_TEXT >> 20} MiB; this is not a {kind.split()[-1]}")
        return data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start})") from None


def parse_yaml(text: str):
    """The tree of YAML text: dicts with string keys, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: with line and column.
    """
    node = compose(text)
    return None if node is None else _Builder().build(node)


def compose(text: str) -> Node | None:
    """The node of YAML text, before its values are made. Raises ValueError with line and column."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"YAML has {len(text)} characters, more than {MAX_TEXT}")
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise ValueError(f"YAML {where}{printable(problem)}") from None


def _at(node: Node, function, *arguments):
    try:
        return function(*arguments)
    except ValueError as error:
        _fail(node, str(error))


def _fail(node: Node, problem: str):
    raise ValueError(f"line {node.start_mark.line + 1}: {problem}") from None
