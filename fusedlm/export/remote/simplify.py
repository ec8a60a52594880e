"""A function or class with what is known put in: branches that cannot run, and what only they use, are left out."""

import ast

from fusedlm.export.remote import facts as known
from fusedlm.export.remote.facts import NOT_NONE, Facts
from fusedlm.export.remote.source import clone

_UNKNOWN = object()
_SIMPLE = (type(None), bool)
Function = ast.FunctionDef


def simplified_function(node: Function, facts: Facts, key: tuple[str, str], run: ast.expr | None = None) -> Function:
    """A copy.

    Args:
        key: module, and function or class.method.
        run: what `run` calls in the public function of an op.
    """
    assumed: dict[str, object] = {}
    rejected: set[str] = set()
    while True:
        found = _Simplifier(facts, key, assumed, run).function(clone(node))
        bindings = _bindings(found)
        wrong = {n for n, value in assumed.items() if any(not _same(value, b) for b in bindings.get(n, ()))}
        if wrong:
            rejected |= wrong
            assumed = {n: value for n, value in assumed.items() if n not in wrong}
            continue
        fresh = {
            name: next(b for b in values if b is not _UNKNOWN)
            for name, values in bindings.items()
            if name not in rejected | assumed.keys() and any(b is not _UNKNOWN for b in values)
        }
        if not fresh:
            break
        assumed |= fresh
    _remove_bindings(found, set(assumed))
    while remove_unused(found):
        pass
    if key[0].endswith(".op"):
        _spread(found)
    return found


def is_pure(node: ast.expr) -> bool:
    """Whether an expression that nothing uses can go."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            name = part.func.id if isinstance(part.func, ast.Name) else getattr(part.func, "attr", None)
            if name not in known.PURE_CALLS:
                return False
        elif isinstance(part, ast.Await | ast.Yield | ast.NamedExpr):
            return False
    return True


def parameters(node: Function) -> list[ast.arg]:
    """Positional ones, then those by keyword alone."""
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def default_of(node: Function, name: str) -> ast.expr | None:
    """None: it has none."""
    positional = [*node.args.posonlyargs, *node.args.args]
    for argument, default in zip(reversed(positional), reversed(node.args.defaults), strict=False):
        if argument.arg == name:
            return default
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if argument.arg == name:
            return default
    return None


class _Simplifier(ast.NodeTransformer):
    def __init__(self, facts: Facts, key: tuple[str, str], local: dict[str, object], run: ast.expr | None):
        self.facts, self.key, self.run = facts, key, run
        self.class_name, _, self.name = key[1].rpartition(".")
        self.values = dict(facts.names) | local
        self.dropped = set(facts.names) | known.REPLAYS
        for name, value in facts.parameters.get(key, {}).items():
            self.dropped.add(name)
            if value is not None:
                self.values[name] = value
        self.in_op = key[0].endswith(".op")

    def function(self, node: Function) -> Function:
        _drop_parameters(node, self.dropped)
        node.body = self.block(node.body)
        return node

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found = []
        for statement in statements:
            result = self.visit(statement)
            found += result if isinstance(result, list) else [] if result is None else [result]
            if found and isinstance(found[-1], ast.Return | ast.Raise):
                break
        return found

    # Expressions

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id in self.values:
            value = self.values[node.id]
            return clone(value) if isinstance(value, ast.expr) else ast.Constant(value)
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        value = self.attribute(node)
        return ast.Constant(value) if isinstance(node.ctx, ast.Load) and isinstance(value, _SIMPLE) else node

    def attribute(self, node: ast.Attribute):
        """What is known of it."""
        if node.attr in known.ATTRIBUTES:
            return known.ATTRIBUTES[node.attr]
        base = node.value
        if isinstance(base, ast.Name) and base.id == "self":
            return self.facts.own.get(self.class_name, {}).get(node.attr, _UNKNOWN)
        if isinstance(base, ast.Name) and base.id in ("torch", "F"):
            return _UNKNOWN
        return self.facts.everywhere.get(node.attr, _UNKNOWN)

    def value(self, node: ast.expr):
        if isinstance(node, ast.Constant):
            return node.value
        return self.attribute(node) if isinstance(node, ast.Attribute) else _UNKNOWN

    def truth(self, node: ast.expr) -> bool | None:
        value = self.value(node)
        return None if value is _UNKNOWN or value is NOT_NONE else bool(value)

    def visit_Compare(self, node):
        self.generic_visit(node)
        if len(node.ops) != 1:
            return node
        left, right = self.value(node.left), self.value(node.comparators[0])
        op = node.ops[0]
        if isinstance(op, ast.Is | ast.IsNot) and right is None and left is not _UNKNOWN:
            return ast.Constant((left is None) == isinstance(op, ast.Is))
        if _UNKNOWN in (left, right) or NOT_NONE in (left, right):
            return node
        if isinstance(op, ast.Eq | ast.NotEq):
            return ast.Constant((left == right) == isinstance(op, ast.Eq))
        if isinstance(op, ast.Gt | ast.Lt) and all(type(x) in (int, float) for x in (left, right)):
            return ast.Constant(left > right if isinstance(op, ast.Gt) else left < right)
        return node

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and (truth := self.truth(node.operand)) is not None:
            return ast.Constant(not truth)
        return node

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        ends = isinstance(node.op, ast.Or)  # the truth of a part that decides
        left = []
        for part in node.values:
            truth = self.truth(part)
            if truth is not None and truth == ends:
                if all(map(is_pure, left)) and isinstance(part, ast.Constant) and isinstance(part.value, bool):
                    return part
                left.append(part)
                break
            is_value = part is node.values[-1] and not (isinstance(part, ast.Constant) and isinstance(part.value, bool))
            if truth is None or is_value:  # `x or 0` is 0 where x is None
                left.append(part)
        if not left:
            return node.values[-1]
        node.values = left
        return left[0] if len(left) == 1 else node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        truth = self.truth(node.test)
        return node if truth is None else node.body if truth else node.orelse

    def visit_Call(self, node):
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        if name in known.NEVER:
            return ast.Constant(False)
        if name == "isinstance" and _classes(node.args[1]) <= known.NO_INSTANCES:
            return ast.Constant(False)
        if name == "with_report":
            return node.args[0]
        if name == "add_parameter":
            node.args = node.args[:2] + _start(node.args[3])
            return node
        is_resolved = isinstance(node.func, ast.Call) and _called(node.func) == "resolve"
        if self.run is not None and (name == "run" or is_resolved):
            node.func = clone(self.run)
        node.keywords = [k for k in node.keywords if k.arg not in known.KEYWORDS | self.facts.names.keys()]
        node.args = [a for a in node.args if not (isinstance(a, ast.Name) and a.id in known.REPLAYS)]
        return node

    def visit_List(self, node):
        self.generic_visit(node)
        node.elts = [part for part in node.elts if not _is_empty(part)]
        return node

    # Statements

    def visit_FunctionDef(self, node):
        if node.name in known.REPLAYS:
            return None
        node.body = self.block(node.body)
        return node

    def visit_If(self, node):
        node.test = self.visit(node.test)
        truth = self.truth(node.test)
        if truth is not None:
            return self.block(node.body if truth else node.orelse)
        if self.in_op and isinstance(node.body[0], ast.Raise) and not node.orelse:
            return None
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        if node.body:
            return node
        if not node.orelse:
            return None
        node.test, node.body, node.orelse = _negated(node.test), node.orelse, []
        return node

    def visit_For(self, node):
        node.iter = self.visit(node.iter)
        node.body = self.block(node.body)
        return node if node.body else None

    def visit_While(self, node):
        node.test = self.visit(node.test)
        node.body = self.block(node.body)
        return node

    def visit_With(self, node):
        if any(isinstance(i.context_expr, ast.Call) and _called(i.context_expr) == "_compilation" for i in node.items):
            return self.block(node.body)
        node.items = [self.visit(item) for item in node.items]
        node.body = self.block(node.body)
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        if (self.class_name, self.name) in known.FIRST_OF_PAIR and isinstance(node.value, ast.Tuple):
            node.value = node.value.elts[0]
        return node

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            if _called(node.value) in known.CHECKS:
                return None
            owner = getattr(node.value.func, "value", None)
            if isinstance(owner, ast.Name) and owner.id in known.VOID:
                return None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node):
        if self.is_constant(node.target) or (node.value is not None and self.is_unread(node.target, node.value)):
            return None
        self.generic_visit(node)
        return node

    def visit_Assign(self, node):
        if isinstance(node.value, ast.Call) and _called(node.value) == "resolve" and self.in_op:
            return None
        targets = [target for target in node.targets if not self.is_constant(target)]
        if not targets:
            return None
        node.value = self.visit(node.value)
        node.targets = targets = [target for target in targets if not self.is_unread(target, node.value)]
        if not targets:
            return None
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            return self.pairs(node)
        return node

    def is_constant(self, target: ast.expr) -> bool:
        return isinstance(target, ast.Attribute) and isinstance(self.attribute(target), _SIMPLE)

    def is_unread(self, target: ast.expr, value: ast.expr) -> bool:
        return isinstance(target, ast.Attribute) and target.attr in self.facts.unread and is_pure(value)

    def pairs(self, node: ast.Assign) -> ast.Assign | None:
        target, value = node.targets[0], node.value
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            kept = [
                (one, other)
                for one, other in zip(target.elts, value.elts, strict=True)
                if not self.is_constant(one) and not self.is_unread(one, other)
                if getattr(one, "id", None) not in known.VOID
            ]
            return _paired(node, kept)
        if len(target.elts) == 2 and getattr(target.elts[1], "id", None) in known.VOID:
            node.targets = [target.elts[0]]
        return node


def _paired(node: ast.Assign, kept: list[tuple[ast.expr, ast.expr]]) -> ast.Assign | None:
    if not kept:
        return None
    ones, others = map(list, zip(*kept, strict=True))
    if len(kept) == 1:
        node.targets, node.value = ones, others[0]
    else:
        node.targets[0].elts, node.value.elts = ones, others
    return node


def _negated(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot):
        op = ast.IsNot() if isinstance(node.ops[0], ast.Is) else ast.Is()
        return ast.Compare(node.left, [op], node.comparators)
    return node.operand if isinstance(node, ast.UnaryOp) else ast.UnaryOp(ast.Not(), node)


def _is_empty(node: ast.expr) -> bool:
    """Whether it is `*(... for ... in ())`."""
    if not (isinstance(node, ast.Starred) and isinstance(node.value, ast.GeneratorExp)):
        return False
    over = node.value.generators[0].iter
    return isinstance(over, ast.Tuple) and not over.elts


def _classes(node: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _called(node: ast.Call) -> str | None:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)


def _start(init: ast.expr) -> list[ast.expr]:
    """The value that a parameter starts as, where that is a constant."""
    is_constant = isinstance(init, ast.Call) and _called(init) == "Constant"
    return init.args if is_constant else []


def _drop_parameters(node: Function, dropped: set[str]) -> None:
    arguments = node.args
    positional = [*arguments.args]
    n_without = len(positional) - len(arguments.defaults)
    kept = [i for i, argument in enumerate(positional) if argument.arg not in dropped]
    arguments.defaults = [arguments.defaults[i - n_without] for i in kept if i >= n_without]
    arguments.args = [positional[i] for i in kept]
    pairs = [
        pair
        for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if pair[0].arg not in dropped | known.KEYWORDS
    ]
    arguments.kwonlyargs, arguments.kw_defaults = [a for a, _ in pairs], [d for _, d in pairs]


def _same(value, binding) -> bool:
    return binding is not _UNKNOWN and type(binding) is type(value) and binding == value


def _bindings(node: Function) -> dict[str, list]:
    """Of each local variable what it is bound to: None, True, False, or not known."""
    found: dict[str, list] = {argument.arg: [_UNKNOWN] for argument in parameters(node)}

    def bind(target, value=None):
        if isinstance(target, ast.Name):
            is_simple = isinstance(value, ast.Constant) and isinstance(value.value, _SIMPLE)
            found.setdefault(target.id, []).append(value.value if is_simple else _UNKNOWN)
        elif isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for i, one in enumerate(target.elts):
                bind(one, None if values is None else values[i])
        elif isinstance(target, ast.Starred):
            bind(target.value)

    for part in ast.walk(node):
        if isinstance(part, ast.Assign):
            for target in part.targets:
                bind(target, part.value)
        elif isinstance(part, ast.AnnAssign):
            bind(part.target, part.value)
        elif isinstance(part, ast.AugAssign | ast.NamedExpr | ast.For | ast.comprehension):
            bind(part.target)
        elif isinstance(part, ast.withitem) and part.optional_vars is not None:
            bind(part.optional_vars)
        elif isinstance(part, ast.FunctionDef) and part is not node:
            found.setdefault(part.name, []).append(_UNKNOWN)
            for argument in parameters(part):
                found.setdefault(argument.arg, []).append(_UNKNOWN)
        elif isinstance(part, ast.Lambda):
            for argument in part.args.args:
                found.setdefault(argument.arg, []).append(_UNKNOWN)
    return found


class _Remover(ast.NodeTransformer):
    """Leaves out assignments to names; `only_pure` of values that can go."""

    def __init__(self, names: set[str], only_pure: bool):
        self.names, self.only_pure, self.changed = names, only_pure, False

    def goes(self, target: ast.expr, value: ast.expr) -> bool:
        return isinstance(target, ast.Name) and target.id in self.names and (not self.only_pure or is_pure(value))

    def visit_Assign(self, node):
        first = node.targets[0]
        if isinstance(first, ast.Tuple) and not isinstance(node.value, ast.Tuple):
            if all(self.goes(target, node.value) for target in first.elts):
                self.changed = True
                return None
            return node
        if isinstance(first, ast.Tuple) and len(node.targets) == 1:
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            kept = [pair for pair in pairs if not self.goes(*pair)]
            self.changed |= len(kept) < len(pairs)
            return _paired(node, kept) if len(kept) < len(pairs) else node
        targets = [target for target in node.targets if not self.goes(target, node.value)]
        self.changed |= len(targets) < len(node.targets)
        node.targets = targets
        return node if targets else None

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        if self.only_pure and node.name in self.names:
            self.changed = True
            return None
        return node


def _remove_bindings(node: Function, names: set[str]) -> None:
    remover = _Remover(names, only_pure=False)
    node.body = [statement for old in node.body if (statement := remover.visit(old)) is not None]
    _fill(node)


def remove_unused(node: Function) -> bool:
    """Leave out assignments to variables that nothing reads; whether there were any."""
    loaded = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    unused = {name for name in _bindings(node) if name not in loaded}
    remover = _Remover(unused, only_pure=True)
    node.body = [statement for old in node.body if (statement := remover.visit(old)) is not None]
    _fill(node)
    return remover.changed


def _spread(node: Function) -> None:
    """Put a tuple in the place of the variable that holds it, `run(*arguments)`."""
    tuples = {
        part.targets[0].id: part.value.elts
        for part in ast.walk(node)
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Tuple) and isinstance(part.targets[0], ast.Name)
    }
    for _ in tuples:
        for part in ast.walk(node):
            for name in ("args", "elts"):
                if isinstance(values := getattr(part, name, None), list):
                    spread = [tuples.get(getattr(getattr(v, "value", None), "id", None)) for v in values]
                    spread = [s if isinstance(v, ast.Starred) else None for v, s in zip(values, spread, strict=True)]
                    setattr(
                        part, name, [x for v, s in zip(values, spread, strict=True) for x in ([v] if s is None else s)]
                    )
    while remove_unused(node):
        pass


class _Emptied(ast.NodeTransformer):
    """Leaves out compound statements whose body became empty."""

    def visit_If(self, node):
        self.generic_visit(node)
        if node.body or not is_pure(node.test):
            node.body = node.body or [ast.Pass()]
            return node
        if node.orelse:
            node.test, node.body, node.orelse = _negated(node.test), node.orelse, []
            return node
        return None

    def visit_For(self, node):
        self.generic_visit(node)
        return node if node.body else None


def _fill(node: ast.FunctionDef) -> None:
    node.body = [part for old in node.body if (part := _Emptied().visit(old)) is not None] or [ast.Pass()]
