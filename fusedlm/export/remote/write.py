"""Linked definitions as the text of a file."""

import ast
import json
import textwrap

from fusedlm.export.remote.docstrings import sentences, trimmed
from fusedlm.export.remote.facts import ATTRIBUTES
from fusedlm.export.remote.layout import known_annotation, text_of, wrapped
from fusedlm.export.remote.link import Linker
from fusedlm.export.remote.scopes import Scoped, bound_names
from fusedlm.export.remote.source import External, Submodule, Symbol, source

MODELING, RUNTIME = "fusedlm.export.remote.modeling", "fusedlm.export.remote.runtime"
_UNROUNDED = "_keep_in_fp32_modules_strict"


def file_text(linker: Linker, parts: str, unrounded: list[str]) -> str:
    """The file.

    Args:
        parts: of the model, in words.
        unrounded: parts of the names of parameters that stay in float32.
    """
    return _Writer(linker).text(parts, unrounded)


class _Writer:
    def __init__(self, linker: Linker):
        self.linker = linker
        self.externals = set(linker.externals)
        self.names = _names(linker)

    def text(self, parts: str, unrounded: list[str]) -> str:
        sections = []
        for module in self._modules():
            found = source(module)
            symbols = [symbol for symbol in self.linker.nodes if symbol.module == module]
            symbols.sort(key=lambda symbol: found.definitions[symbol.name].lineno)
            definitions = [self._definition(symbol) for symbol in symbols]
            if module != MODELING:
                first = sentences(" ".join(found.docstring.split()).split(". ")[0].rstrip(".") + ".")
                comment = "".join(f"{line}\n" for line in textwrap.wrap(first, 118, initial_indent="# "))
                definitions[0] = comment + "\n\n" * bool(first) + definitions[0]
            sections.append(_joined(definitions))
        sections[-1] = sections[-1].replace(f"{_UNROUNDED} = []", f"{_UNROUNDED} = {json.dumps(unrounded)}")
        tail = "\n".join(wrapped(ast.unparse(statement))[0] for statement in source(MODELING).statements)
        return "\n\n\n".join([self._header(parts), *sections, tail]) + "\n"

    def _header(self, parts: str) -> str:
        lines = [
            '"""A language model of fusedlm for Transformers: ' + f"{parts}.",
            "",
            "Written by `fusedlm export --to hf-code` from the modules of fusedlm, of which it holds what this model",
            "needs, in plain PyTorch. Names of tensors end with their axes: B sequences, T tokens, S cached tokens,",
            'H heads, G groups, D the width; other letters are explained where they are used."""',
            "",
            "from __future__ import annotations",
            "",
        ]
        plain = sorted({e.statement() for e in self.externals if e.name is None})
        named: dict[str, set[str]] = {}
        for external in self.externals:
            if external.name is not None:
                shown = external.name if external.alias == external.name else f"{external.name} as {external.alias}"
                named.setdefault(external.module, set()).add(shown)
        froms = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items())]
        standard = [s for s in plain + froms if s.split()[1].split(".")[0] not in ("torch", "transformers")]
        others = [s for s in plain + froms if s not in standard]
        return "\n".join(lines + standard + ([""] if standard else []) + others)

    def _modules(self) -> list[str]:
        """In the order of their imports."""
        wanted = {symbol.module for symbol in self.linker.nodes}
        found: list[str] = []
        seen: set[str] = set()

        def visit(module: str) -> None:
            if module in seen:
                return
            seen.add(module)
            for target in source(module).imports.values():
                if isinstance(target, Submodule):
                    visit(target.module)
                elif isinstance(target, Symbol):
                    symbol = self.linker.resolve(target.module, target.name)
                    if isinstance(symbol, Symbol):
                        visit(symbol.module)
            if module in wanted:
                found.append(module)

        visit(RUNTIME)
        visit(MODELING)
        return found

    def _definition(self, symbol: Symbol) -> str:
        node = self.linker.nodes[symbol]
        _Renamer(self, symbol.module).visit(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.name = self.names[symbol]
            self._trim(symbol, node)
        elif isinstance(node, ast.Assign):
            node.targets[0].id = self.names[symbol]
        return text_of(node)

    def _trim(self, symbol: Symbol, node: ast.FunctionDef | ast.ClassDef) -> None:
        """Annotations and docstrings without what is left out."""
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef):
                part.returns = self._annotation(symbol.module, part.returns)
                for argument in [*part.args.args, *part.args.kwonlyargs]:
                    argument.annotation = self._annotation(symbol.module, argument.annotation)
            elif isinstance(part, ast.AnnAssign):
                part.annotation = self._annotation(symbol.module, part.annotation) or ast.Name("object")
        if symbol.module == MODELING:
            return
        if isinstance(node, ast.FunctionDef):
            _trim_docstring(node, 4, self.linker.dropped((symbol.module, symbol.name)), symbol.module)
            return
        for function in node.body:
            if isinstance(function, ast.FunctionDef):
                dropped = self.linker.dropped((symbol.module, f"{symbol.name}.{function.name}"))
                _trim_docstring(function, 8, dropped, symbol.module)
        constructor = self.linker.facts.parameters.get((symbol.module, f"{symbol.name}.__init__"), {})
        gone = ATTRIBUTES.keys() | self.linker.facts.unread | constructor.keys()
        _trim_docstring(node, 4, set(gone), symbol.module)

    def _annotation(self, module: str, node: ast.expr | None) -> ast.expr | None:
        def is_known(name: str) -> bool:
            found = self.linker.resolve(module, name)
            if isinstance(found, External):
                self.externals.add(found)
            return isinstance(found, External) or found in self.linker.nodes

        return known_annotation(node, is_known)


def _trim_docstring(node, indent: int, dropped: set[str], module: str) -> None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        raises = any(isinstance(part, ast.Raise) for part in ast.walk(node)) and not module.endswith(".op")
        first.value.value = trimmed(first.value.value, indent, dropped, raises=raises)
        if not first.value.value:
            node.body = node.body[1:] or [ast.Pass()]


class _Renamer(Scoped):
    """Names of definitions as they are in the file."""

    def __init__(self, writer: _Writer, module: str):
        super().__init__()
        self.writer, self.module = writer, module

    def visit_Name(self, node):
        if self.is_global(node):
            found = self.writer.linker.resolve(self.module, node.id)
            if found in self.writer.names:
                node.id = self.writer.names[found]

    def generic_visit(self, node):
        for name, old in ast.iter_fields(node):
            if isinstance(old, list):
                for i, part in enumerate(old):
                    if isinstance(part, ast.AST):
                        old[i] = self.replaced(part)
            elif isinstance(old, ast.AST):
                setattr(node, name, self.replaced(old))

    def replaced(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and self.is_global(node.value):
            owner = self.writer.linker.resolve(self.module, node.value.id)
            if isinstance(owner, Submodule):
                return ast.Name(self.writer.names[self.writer.linker.resolve(owner.module, node.attr)], ast.Load())
        self.visit(node)
        return node

    def visit_FunctionDef(self, node):
        node.args.defaults = [self.replaced(part) for part in node.args.defaults]
        node.args.kw_defaults = [part and self.replaced(part) for part in node.args.kw_defaults]
        node.decorator_list = [self.replaced(part) for part in node.decorator_list]
        self._bound.append(bound_names(node))
        node.body = [self.replaced(part) for part in node.body]
        self._bound.pop()

    def visit_ClassDef(self, node):
        node.bases = [self.replaced(part) for part in node.bases]
        node.decorator_list = [self.replaced(part) for part in node.decorator_list]
        super().visit_ClassDef(node)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            node.value = self.replaced(node.value)

    def visit_Lambda(self, node):
        self._bound.append({argument.arg for argument in node.args.args})
        node.body = self.replaced(node.body)
        self._bound.pop()


def _names(linker: Linker) -> dict[Symbol, str]:
    """One for each definition: its own, or where two have the same that of an op's reference with the op before it."""
    by_name: dict[str, list[Symbol]] = {}
    for symbol in linker.nodes:
        by_name.setdefault(symbol.name, []).append(symbol)
    found = {}
    for name, symbols in by_name.items():
        for symbol in symbols:
            folder, leaf = symbol.module.split(".")[-2:]
            is_inner = len(symbols) > 1 and leaf in ("reference", "sdpa", "order")
            if is_inner:
                found[symbol] = f"{name}_reference" if name.startswith(folder) else f"{folder}_{name.strip('_')}"
            elif len(symbols) > 1 and leaf not in ("op", "module"):
                found[symbol] = f"{leaf.upper()}_{name}" if name.isupper() else f"{leaf}_{name.strip('_')}"
            else:
                found[symbol] = name
    if len(set(found.values())) < len(found):
        raise RuntimeError(f"two definitions of one name: {sorted(found.values())}")
    return found


def _joined(parts: list[str]) -> str:
    """Two blank lines around functions and classes, none between constants."""
    found = parts[0]
    for before, part in zip(parts, parts[1:], strict=False):
        is_block = any("\n" in one and ("def " in one or "class " in one) for one in (before, part))
        found += ("\n\n\n" if is_block else "\n") + part
    return found
