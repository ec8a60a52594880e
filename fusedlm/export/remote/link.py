"""All that a few definitions need, from whichever modules, simplified, for one file."""

import ast
import builtins

from fusedlm.export.remote import facts as known
from fusedlm.export.remote.calls import ArgumentDropper, Calls, is_of_torch
from fusedlm.export.remote.facts import Facts
from fusedlm.export.remote.scopes import Scoped
from fusedlm.export.remote.simplify import default_of, is_pure, parameters, remove_unused, simplified_function
from fusedlm.export.remote.source import External, Submodule, Symbol, clone, resolve, source

_BACKENDS = ("sdpa", "reference")  # the first that an op has: both are plain PyTorch
_ROUNDS = 30
_CONSTANTS = (type(None), bool)


class Linker:
    """Definitions by symbol, as `link` leaves them.

    Attributes:
        nodes: simplified. externals: names from other packages.
    """

    def __init__(self, roots: list[Symbol], facts: Facts, *, verbatim: str, grafts: dict, substitutes: dict):
        """
        Args:
            verbatim: the module whose definitions stay as they are.
            grafts: functions in place of methods, by (class, method).
            substitutes: definitions in place of others.
        """
        self.roots, self.facts, self.verbatim = roots, facts, verbatim
        self.grafts, self.substitutes = grafts, substitutes
        self.nodes: dict[Symbol, ast.stmt] = {}
        self.externals: set[External] = set()
        self.loaded: set[str] = set()
        self.keywords: set[str] = set()  # of `forward`, left out
        self._functions: dict = {}  # simplified, by what is known of them
        self._read: dict[int, tuple] = {}  # of a part of a definition, by its id: itself, references and attributes

    def link(self) -> "Linker":
        for _ in range(_ROUNDS):
            self._close()
            if not self._infer():
                break
        else:
            raise RuntimeError("the simplification does not end")
        for symbol, node in self.nodes.items():
            ArgumentDropper(self, symbol.module).visit(node)
            for part in ast.walk(node) if symbol.module != self.verbatim else ():
                while isinstance(part, ast.FunctionDef) and remove_unused(part):
                    pass
        return self

    # What is needed

    def resolve(self, module: str, name: str) -> Symbol | External | Submodule | None:
        found = resolve(module, name)
        return self.substitutes.get(found, found) if isinstance(found, Symbol) else found

    def _close(self) -> None:
        """Set nodes, externals and the names of attributes that are read, by the facts of now."""
        self.loaded = {"forward"}
        while True:
            before = len(self.loaded)
            self.nodes, self.externals = {}, set()
            waiting = list(self.roots)
            while waiting:
                symbol = waiting.pop()
                if symbol in self.nodes:
                    continue
                self.nodes[symbol] = node = self._simplified(symbol)
                for found in self.references(node, symbol.module):
                    if isinstance(found, Symbol):
                        waiting.append(found)
                    elif isinstance(found, External):
                        self.externals.add(found)
                self.loaded |= self._attributes(node, symbol.module)
            if len(self.loaded) == before:
                return

    def _simplified(self, symbol: Symbol) -> ast.stmt:
        node = source(symbol.module).definitions[symbol.name]
        if symbol.module == self.verbatim:
            return clone(node)
        if isinstance(node, ast.FunctionDef):
            return self._function((symbol.module, symbol.name), node, _backend(symbol, node))
        if isinstance(node, ast.ClassDef):
            return self._simplified_class(symbol, node)
        if symbol.name in self.facts.tables:
            node = clone(node)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            kept = [(key, value) for key, value in pairs if key.value in self.facts.tables[symbol.name]]
            node.value.keys, node.value.values = [key for key, _ in kept], [value for _, value in kept]
            return node
        return clone(node)

    def _simplified_class(self, symbol: Symbol, node: ast.ClassDef) -> ast.ClassDef:
        found = ast.ClassDef(node.name, clone(node.bases), [], [], clone(node.decorator_list))
        grafted = {method: at for (owner, method), at in self.grafts.items() if owner == symbol}
        gone = known.ATTRIBUTES.keys() | self.facts.unread | self.facts.names.keys()
        for part in node.body:
            if isinstance(part, ast.FunctionDef):
                if at := grafted.get(part.name):
                    function = clone(source(at.module).definitions[at.name])
                    function.name = part.name
                    found.body.append(function)
                elif self._is_reached(node, part):
                    found.body.append(self._function((symbol.module, f"{symbol.name}.{part.name}"), part))
            elif not (isinstance(part, ast.AnnAssign) and part.target.id in gone) and not self._is_unread(part):
                found.body.append(clone(part))
        found.body = found.body or [ast.Pass()]
        return found

    def _is_reached(self, owner: ast.ClassDef, method: ast.FunctionDef) -> bool:
        reached = method.name in self.loaded or method.name.startswith("__")
        return reached and (owner.name, method.name) not in known.LEFT_OUT

    def _function(self, key: tuple[str, str], node: ast.FunctionDef, run: ast.expr | None = None) -> ast.FunctionDef:
        known_now = (key, frozenset(self.facts.parameters.get(key, ())), len(self.facts.unread))
        if known_now not in self._functions:
            self._functions[known_now] = simplified_function(node, self.facts, key, run)
        return self._functions[known_now]

    def _is_unread(self, part: ast.stmt) -> bool:
        return isinstance(part, ast.Assign) and part.targets[0].id in self.facts.unread

    def references(self, node: ast.stmt, module: str) -> list[Symbol | External]:
        """What a definition reads at module level, annotations aside."""
        return [found for part in self._parts(node, module) for found in self._reading(part, module)[1]]

    def _attributes(self, node: ast.stmt, module: str) -> set[str]:
        """The names of the attributes that a definition reads."""
        return {name for part in self._parts(node, module) for name in self._reading(part, module)[2]}

    def _parts(self, node: ast.stmt, module: str) -> list[ast.stmt]:
        """The methods of a class and the rest of it: methods stay the same when others come."""
        if not isinstance(node, ast.ClassDef) or module == self.verbatim:
            return [node]
        rest = [part for part in node.body if not isinstance(part, ast.FunctionDef)]
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        return [*methods, ast.ClassDef(node.name, node.bases, [], rest, node.decorator_list)]

    def _reading(self, part: ast.stmt, module: str) -> tuple:
        if id(part) not in self._read:
            finder = _References(self, module)
            finder.visit(part)
            self._read[id(part)] = (part, finder.found, _attributes(part))  # the part too, so that its id stays its own
        return self._read[id(part)]

    # What the calls say

    def _infer(self) -> bool:
        """Add the parameters that are always the same, or not read, and the attributes that nothing reads."""
        calls = self._calls()
        changed = False
        for key, (node, used) in self._callables().items():
            of_this = calls.get(key)
            if of_this is None:
                continue
            names = [argument.arg for argument in parameters(node)]
            read = {part.id for part in ast.walk(used) if isinstance(part, ast.Name)}
            rebound = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and not _is_load(part)}
            used_whole = {
                part.value.id
                for part in ast.walk(used)
                if isinstance(part, ast.Attribute | ast.Subscript) and isinstance(part.value, ast.Name)
            }
            dropped = self.facts.parameters.setdefault(key, {})
            for name in names:
                if name in dropped or name in self.facts.names or name in known.KEYWORDS or name in ("self", "cls"):
                    continue
                values = [self._argument(node, call, name) for call in of_this]
                if any(value is _UNKNOWN for value in values):
                    continue
                if name not in read and all(value is None or is_pure(value) for value in values):
                    dropped[name], changed = None, True
                elif _is_function(default := default_of(node, name)) and all(value is default for value in values):
                    dropped[name], changed = default, True
                elif values and name not in rebound | used_whole and all(_is_constant(value) for value in values):
                    kinds = {(type(value.value), value.value) for value in values}
                    if len(kinds) == 1:
                        dropped[name], changed = values[0], True
        changed |= self._infer_keywords()
        unread = self._assigned() - self.loaded - known.READ_ELSEWHERE
        changed |= not unread <= self.facts.unread
        self.facts.unread |= unread
        return changed

    def _assigned(self) -> set[str]:
        found = set()
        for symbol, node in self.nodes.items():
            if symbol.module == self.verbatim or not isinstance(node, ast.ClassDef):
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    found.add(part.attr)
            is_data = any("dataclass" in ast.unparse(part) for part in node.decorator_list)
            is_data |= any(ast.unparse(base) == "NamedTuple" for base in node.bases)
            found |= {part.targets[0].id for part in node.body if isinstance(part, ast.Assign)}
            if not is_data:
                found |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
        return found

    def _infer_keywords(self) -> bool:
        """Of `forward`, which is called through modules, the parameters by keyword that no call gives."""
        given: dict[str, list[ast.expr]] = {}
        for node in self.nodes.values():
            for part in ast.walk(node):
                if isinstance(part, ast.Call) and not is_of_torch(part):
                    for keyword in part.keywords:
                        given.setdefault(keyword.arg, []).append(keyword.value)
        changed = False
        for key, (node, _) in self._callables(forward=True).items():
            dropped = self.facts.parameters.setdefault(key, {})
            for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
                name = argument.arg
                if name in dropped or default is None or not _is_constant(default):
                    continue
                values = given.get(name, [])
                if all(_is_constant(value) and value.value is default.value for value in values):
                    dropped[name], changed = default, True
                    self.keywords.add(name)
        return changed

    def _callables(self, forward: bool = False) -> dict[tuple[str, str], tuple[ast.FunctionDef, ast.FunctionDef]]:
        """(as written, simplified) of functions and of methods that one class alone has, without `forward`; or of the
        `forward`s."""
        found = {}
        for symbol, node in self.nodes.items():
            if symbol.module == self.verbatim:
                continue
            written = source(symbol.module).definitions[symbol.name]
            if isinstance(node, ast.FunctionDef) and not forward:
                found[symbol.module, symbol.name] = (written, node)
            elif isinstance(node, ast.ClassDef):
                originals = {part.name: part for part in written.body if isinstance(part, ast.FunctionDef)}
                for part in node.body:
                    name = getattr(part, "name", None)
                    if name in originals and (name == "forward") == forward and (symbol, name) not in self.grafts:
                        found[symbol.module, f"{symbol.name}.{name}"] = (originals[name], part)
        return found

    def _calls(self) -> dict[tuple[str, str], list[ast.Call] | None]:
        """The calls of each function; None where it is used in another way too."""
        found: dict = {}
        for symbol, node in self.nodes.items():
            collector = Calls(self, symbol.module)
            collector.visit(node)
            for key, call in collector.found:
                if call is None:
                    found[key] = None
                elif found.get(key, ()) is not None:
                    found.setdefault(key, []).append(call)
        for node in self.nodes.values():  # called by those that inherit them
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                for symbol in self.nodes:
                    if symbol.name == ast.unparse(base):
                        found[symbol.module, f"{symbol.name}.__init__"] = None
        for table in self.facts.tables:  # called with dictionaries of arguments
            for symbol, node in self.nodes.items():
                if symbol.name == table:
                    for value in node.value.values:
                        target = self.resolve(symbol.module, value.id)
                        found[target.module, f"{target.name}.__init__"] = None
        return found

    def callee(self, module: str, func: ast.expr, inside: Symbol | None = None) -> list[tuple[str, str]]:
        """The keys of what a call may run, as far as they are known by name. inside: the class that the call is in."""
        if isinstance(func, ast.Name):
            found = self.resolve(module, func.id)
            return self.keys_of(found)
        if isinstance(func, ast.Attribute):
            if isinstance(func.value, ast.Name):
                owner = self.resolve(module, func.value.id)
                if isinstance(owner, Submodule):
                    return self.keys_of(self.resolve(owner.module, func.attr))
                if isinstance(owner, External):
                    return []
            if func.attr == "__init__":
                return []
            having = [
                symbol
                for symbol, node in self.nodes.items()
                if isinstance(node, ast.ClassDef) and symbol.module != self.verbatim
                if any(isinstance(part, ast.FunctionDef) and part.name == func.attr for part in node.body)
            ]
            if inside is not None and isinstance(func.value, ast.Name) and func.value.id in ("self", "cls"):
                family = {*self._bases(inside), inside.name}
                having = [s for s in having if s.name in family or inside.name in self._bases(s)] or having
            return [(symbol.module, f"{symbol.name}.{func.attr}") for symbol in having]
        return []

    def _bases(self, symbol: Symbol) -> set[str]:
        """Names of the classes that one inherits from."""
        node = self.nodes.get(symbol)
        names = {ast.unparse(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
        further = [self._bases(other) for other in self.nodes if other.name in names and other != symbol]
        return names.union(*further)

    def keys_of(self, found) -> list[tuple[str, str]]:
        if not isinstance(found, Symbol) or found not in self.nodes:
            return []
        is_class = isinstance(self.nodes[found], ast.ClassDef)
        return [(found.module, f"{found.name}.__init__" if is_class else found.name)]

    def written(self, key: tuple[str, str]) -> ast.FunctionDef | None:
        """As written; of a class without constructor one that takes its fields."""
        name, _, method = key[1].partition(".")
        node = source(key[0]).definitions[name]
        if not method:
            return node
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == method:
                return part
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        if method != "__init__" or not fields:
            return None
        arguments = ast.arguments([], [ast.arg("self"), *(ast.arg(part.target.id) for part in fields)], None, [], [])
        arguments.defaults = []
        return ast.FunctionDef("__init__", arguments, [], [])

    def dropped(self, key: tuple[str, str]) -> set[str]:
        """The parameters that are left out."""
        names = set(self.facts.names) | known.KEYWORDS | self.facts.parameters.get(key, {}).keys()
        written = self.written(key)
        if written is not None and key[1].endswith(".__init__") and not written.body:
            names |= known.ATTRIBUTES.keys()
        return names

    def _argument(self, node: ast.FunctionDef, call: ast.Call, name: str) -> ast.expr | None:
        """What a call gives for a parameter; the default where it gives none."""
        for keyword in call.keywords:
            if keyword.arg == name:
                return keyword.value
        for keyword in call.keywords:
            if keyword.arg is None and name in _SPREAD.get(ast.unparse(keyword.value), (name,)):
                return _UNKNOWN
        positional = [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
        arguments = list(call.args)
        if name in positional:
            index = positional.index(name)
            if any(isinstance(argument, ast.Starred) for argument in arguments[: index + 1]):
                return _UNKNOWN
            if index < len(arguments):
                return arguments[index]
        default = default_of(node, name)
        return _UNKNOWN if default is None else default


_UNKNOWN = object()
_SPREAD = {"blocks[name]": ("mixer", "ffn")}  # the keys of dictionaries of arguments


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _is_constant(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, _CONSTANTS)


def _is_function(node) -> bool:
    """Whether it is the default of a parameter that is a function of ours."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load)


def _attributes(node: ast.stmt) -> set[str]:
    return {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load)}


def _backend(symbol: Symbol, node: ast.FunctionDef) -> ast.expr | None:
    """What the public function of an op runs here."""
    if not symbol.module.endswith(".op"):
        return None
    named = next(
        (
            part.args[0].value
            for part in ast.walk(node)
            if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "resolve"
        ),
        None,
    )
    for definition in source(symbol.module).definitions.values():
        value = getattr(definition, "value", None)
        if isinstance(value, ast.Call) and getattr(value.func, "id", None) == "Op" and value.args[0].value == named:
            backends = {backend.args[0].value: backend.args[1] for backend in value.args[1].elts}
            return next(backends[name] for name in _BACKENDS if name in backends)
    return None


class _References(Scoped):
    def __init__(self, linker: Linker, module: str):
        super().__init__()
        self.linker, self.module, self.found = linker, module, []

    def visit_Name(self, node):
        if self.is_global(node):
            found = self.linker.resolve(self.module, node.id)
            if found is None and not hasattr(builtins, node.id) and node.id != "super":
                raise NameError(f"{self.module}: {node.id} is not defined")
            if isinstance(found, Symbol | External):
                self.found.append(found)

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and self.is_global(node.value):
            owner = self.linker.resolve(self.module, node.value.id)
            if isinstance(owner, Submodule):
                self.found.append(self.linker.resolve(owner.module, node.attr))
                return
        self.visit(node.value)
