"""Which names of a definition belong to its module."""

import ast

from fusedlm.export.remote.simplify import parameters
from fusedlm.export.remote.source import Symbol


class Scoped(ast.NodeVisitor):
    """Visits names that belong to the module, and no annotations."""

    def __init__(self):
        self._bound: list[set[str]] = []
        self._classes: list[str] = []

    def inside(self) -> Symbol | None:
        """The class that is visited."""
        return Symbol(self.module, self._classes[-1]) if self._classes else None

    def is_global(self, node: ast.Name) -> bool:
        return isinstance(node.ctx, ast.Load) and not any(node.id in bound for bound in self._bound)

    def visit_FunctionDef(self, node):
        for part in [*node.decorator_list, *node.args.defaults, *node.args.kw_defaults]:
            if part is not None:
                self.visit(part)
        self._bound.append(bound_names(node))
        for part in node.body:
            self.visit(part)
        self._bound.pop()

    def visit_ClassDef(self, node):
        for part in [*node.bases, *node.keywords, *node.decorator_list]:
            self.visit(part)
        own = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        own |= {target.id for part in node.body if isinstance(part, ast.Assign) for target in part.targets}
        self._classes.append(node.name)
        for part in node.body:  # functions do not see the names of their class
            if isinstance(part, ast.FunctionDef):
                self.visit(part)
            else:
                self._bound.append(own)
                self.visit(part)
                self._bound.pop()
        self._classes.pop()

    def visit_Lambda(self, node):
        self._bound.append({argument.arg for argument in node.args.args})
        self.visit(node.body)
        self._bound.pop()

    def visit_AnnAssign(self, node):
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)


def bound_names(node: ast.FunctionDef) -> set[str]:
    found = {argument.arg for argument in parameters(node)}
    found |= {argument.arg for argument in (node.args.vararg, node.args.kwarg) if argument is not None}
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        elif isinstance(part, ast.FunctionDef) and part is not node:
            found.add(part.name)
    return found
