"""The calls in linked definitions: what they run, and the same without arguments that are left out."""

import ast
from typing import TYPE_CHECKING

from fusedlm.export.remote.scopes import Scoped
from fusedlm.export.remote.source import Submodule

if TYPE_CHECKING:
    from fusedlm.export.remote.link import Linker


def is_of_torch(node: ast.Call) -> bool:
    owner = getattr(node.func, "value", None)
    return isinstance(owner, ast.Name) and owner.id in ("torch", "F")


class Calls(Scoped):
    """(key, call) of calls; (key, None) where a function is named without one."""

    def __init__(self, linker: "Linker", module: str):
        super().__init__()
        self.linker, self.module, self.found = linker, module, []

    def visit_Call(self, node):
        keys = []
        if not isinstance(node.func, ast.Name) or self.is_global(node.func):
            keys = self.linker.callee(self.module, node.func, self.inside())
        only = len(keys) == 1
        self.found += [(key, node if only else None) for key in keys]
        if isinstance(node.func, ast.Attribute):
            self.visit(node.func.value)
        for part in [*node.args, *node.keywords]:
            self.visit(part)

    def visit_Name(self, node):
        if self.is_global(node):
            found = self.linker.resolve(self.module, node.id)
            self.found += [(key, None) for key in self.linker.keys_of(found) if not key[1].endswith(".__init__")]

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and self.is_global(node.value):
            owner = self.linker.resolve(self.module, node.value.id)
            if isinstance(owner, Submodule):
                found = self.linker.resolve(owner.module, node.attr)
                self.found += [(key, None) for key in self.linker.keys_of(found)]
                return
        self.visit(node.value)


class ArgumentDropper(Scoped):
    """Takes the arguments for parameters that are left out from calls."""

    def __init__(self, linker: "Linker", module: str):
        super().__init__()
        self.linker, self.module = linker, module
        self.functions: list[ast.FunctionDef] = []

    def visit_FunctionDef(self, node):
        self.functions.append(node)
        super().visit_FunctionDef(node)
        self.functions.pop()

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and not self.is_global(node.func):
            node.keywords = [k for k in node.keywords if k.arg not in self.linker.keywords]
            return
        written = [(key, self.linker.written(key)) for key in self.linker.callee(self.module, node.func, self.inside())]
        written = [(self.linker.dropped(key), function) for key, function in written if function is not None]
        if not written:
            if not is_of_torch(node):
                node.keywords = [k for k in node.keywords if k.arg not in self.linker.keywords]
            return
        kept, place = [], 0
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                place += self._length(argument.value)
                kept.append(argument)
            else:
                if not self._goes(written, place):
                    kept.append(argument)
                place += 1
        node.args = kept
        node.keywords = [k for k in node.keywords if not all(k.arg in dropped for dropped, _ in written)]

    @staticmethod
    def _goes(written: list, place: int) -> bool:
        names = []
        for dropped, function in written:
            positional = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]
            if place < len(positional):
                names.append(positional[place] in dropped)
        return bool(names) and all(names)

    def _length(self, starred: ast.expr) -> int:
        """Of a local variable that is a tuple; else as many as there can be, so that nothing after it is taken."""
        for part in ast.walk(self.functions[-1]) if self.functions and isinstance(starred, ast.Name) else ():
            if not isinstance(part, ast.Assign):
                continue
            target, value = part.targets[0], part.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=True)
            for one, other in pairs:
                if isinstance(one, ast.Name) and one.id == starred.id and isinstance(other, ast.Tuple):
                    return len(other.elts)
        return 1000
