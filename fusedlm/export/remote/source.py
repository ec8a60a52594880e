"""Modules of the package as syntax trees: what they define and import. Nothing is imported to read them."""

import ast
import importlib.util
import io
import tokenize
from dataclasses import dataclass
from functools import cache

PACKAGE = "fusedlm"
COMMENTS = "comments"  # attribute of a statement: the comments above and behind it


@dataclass(frozen=True)
class Symbol:
    """A definition at module level."""

    module: str
    name: str


@dataclass(frozen=True)
class External:
    """A name from another package. name: None: the module itself."""

    module: str
    name: str | None
    alias: str

    def statement(self) -> str:
        if self.name is not None:
            return f"from {self.module} import {self.name}" + (f" as {self.alias}" if self.alias != self.name else "")
        return f"import {self.module}" + (f" as {self.alias}" if self.alias != self.module.split(".")[0] else "")


@dataclass(frozen=True)
class Submodule:
    """A module of ours that is used by its name."""

    module: str


class Source:
    """One module.

    definitions: functions, classes and constants by name. order: the line of each. imports: by local name.
    """

    def __init__(self, module: str):
        path = importlib.util.find_spec(module).origin
        with open(path, encoding="utf-8") as file:
            text = file.read()
        self.module, self.is_package = module, path.endswith("__init__.py")
        tree = ast.parse(text)
        _attach_comments(tree, text)
        self.docstring = ast.get_docstring(tree) or ""
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, External | Symbol | Submodule] = {}
        self.statements = [node for node in tree.body if isinstance(node, ast.Expr)][bool(self.docstring) :]
        for node in tree.body:
            self._read(node)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self.definitions[node.targets[0].id] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            self._read_pairs(node)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.definitions[node.target.id] = node
        elif isinstance(node, ast.Import):
            for one in node.names:
                alias = one.asname or one.name.split(".")[0]
                self.imports[alias] = External(one.name if one.asname else alias, None, alias)
        elif isinstance(node, ast.ImportFrom):
            for one in node.names:
                self.imports[one.asname or one.name] = _imported(node.module, one.name, one.asname or one.name)

    def _read_pairs(self, node: ast.Assign) -> None:
        """`A, B = 1, 2` as two definitions."""
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(node.targets[0].elts):
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                one = ast.copy_location(ast.Assign([target], value), node)
                setattr(one, COMMENTS, getattr(node, COMMENTS, []))
                self.definitions[target.id] = one


def clone(node):
    """A deep copy of a syntax tree."""
    if isinstance(node, ast.AST):
        found = type(node)()
        for name, value in node.__dict__.items():
            found.__dict__[name] = clone(value) if isinstance(value, ast.AST | list) else value
        return found
    return [clone(part) for part in node] if isinstance(node, list) else node


@cache
def source(module: str) -> Source:
    return Source(module)


def resolve(module: str, name: str) -> Symbol | External | Submodule | None:
    """What a name at module level is, followed through our own imports; None: a builtin, or not defined."""
    found = source(module)
    if name in found.definitions:
        return Symbol(module, name)
    target = found.imports.get(name)
    return resolve(target.module, target.name) if isinstance(target, Symbol) else target


def _imported(module: str, name: str, alias: str) -> External | Symbol | Submodule:
    if module.split(".")[0] != PACKAGE:
        return External(module, name, alias)
    if _exists(f"{module}.{name}"):
        return Submodule(f"{module}.{name}")
    return Symbol(module, name)


@cache
def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _attach_comments(tree: ast.Module, text: str) -> None:
    """Give each statement the comments between the one before and its end."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and "fmt:" not in token.string:
            comments[token.start[0]] = token.string
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    statements.sort(key=lambda node: (node.lineno, -node.end_lineno))
    for line, comment in sorted(comments.items()):
        within = [node for node in statements if node.lineno <= line <= _header_end(node)]
        after = [node for node in statements if node.lineno > line]
        owner = max(within, key=lambda node: node.lineno) if within else (after[0] if after else None)
        if owner is not None:
            setattr(owner, COMMENTS, [*getattr(owner, COMMENTS, []), comment])


def _header_end(node: ast.stmt) -> int:
    """The last line of a simple statement, or of what is before the body of a compound one."""
    return node.lineno if hasattr(node, "body") else node.end_lineno
