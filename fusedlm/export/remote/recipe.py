"""What is known of the models of one recipe: the keys that are off, and the attributes that are alike everywhere."""

import ast

from fusedlm.config.model import ModelConfig
from fusedlm.export.remote.facts import ATTRIBUTES, NOT_NONE, READ_ELSEWHERE, Facts
from fusedlm.export.remote.source import Symbol, resolve, source
from fusedlm.model import Decoder, build_model
from fusedlm.nn.module import Module

DECODER = Symbol("fusedlm.model.decoder", "Decoder")
_TABLES = {"MIXERS": "mixer", "FFNS": "ffn"}
_EMPTY = (type(None), bool)


def known_of(config: ModelConfig, model: Decoder) -> tuple[Facts, dict]:
    """The facts, and the arguments of the decoder that are not left out by them.

    Args:
        model: of config, on any device.
    """
    arguments = _arguments(config, model)
    facts = Facts()
    facts.own, facts.everywhere = _attributes(model)
    _choose(facts, arguments)
    _stored(facts, model)
    # Distributions of the start, which parameters here do not have.
    facts.parameters["fusedlm.nn.linear", "Linear.__init__"] = {"init": ast.Constant(True)}
    if config.yarn is None:
        facts.names["yarn"] = None
    return facts, arguments


def _arguments(config: ModelConfig, model: Decoder) -> dict:
    """Those of the decoder, of the blocks that the pattern uses."""
    tree = config.model_dump()
    del tree["mup"], tree["mtp"]
    # Of use at the start of training alone.
    del tree["init"]
    tree["vocab_multiple"] = 1
    tree["blocks"] = {name: tree["blocks"][name] for name in dict.fromkeys(model.layer_names)}
    return tree


def scales(config: ModelConfig, model: Decoder) -> dict[str, float]:
    """What the maximal update parametrisation changed, by the path of the attribute."""
    if config.mup is None:
        return {}
    plain = build_model(config.model_copy(update={"mup": None}), vocab_size=1, device="meta")
    modules, found = dict(plain.named_modules()), {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is float and value != vars(modules[path]).get(name):
                found[f"{path}.{name}" if path else name] = value
    return found


def _attributes(model: Decoder) -> tuple[dict[str, dict], dict[str, object]]:
    """Of each class the attributes that are the same in all of its instances, and those that are in all classes."""
    seen: dict[str, dict[str, list]] = {}
    for module in model.modules():
        values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for group in (module._parameters, module._buffers, module._modules):
            values |= group
        for name in values:
            for kind in type(module).__mro__:
                if issubclass(kind, Module) and kind is not Module:
                    seen.setdefault(kind.__name__, {}).setdefault(name, []).append(values[name])
    own = {kind: {n: v for n, all_ in found.items() if (v := _common(all_)) is not ...} for kind, found in seen.items()}
    names = {name for found in seen.values() for name in found}
    together = {name: [v for found in seen.values() for v in found.get(name, ())] for name in names}
    everywhere = {name: value for name, all_ in together.items() if (value := _common(all_)) is not ...}
    shared = {"rope", "scale", "lengths", "training", *ATTRIBUTES}
    own = {kind: {n: v for n, v in found.items() if n not in READ_ELSEWHERE} for kind, found in own.items()}
    return own, {name: value for name, value in everywhere.items() if name not in shared | READ_ELSEWHERE}


def _common(values: list):
    """None, a truth value or a number that all are; NOT_NONE; or ...: neither."""
    first = values[0]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        return ...
    if isinstance(first, bool | int | float) and all(type(v) is type(first) and v == first for v in values):
        return first if isinstance(first, bool) or first in (0, 1) else NOT_NONE
    return NOT_NONE


def _choose(facts: Facts, arguments: dict) -> None:
    """Leave out the keys that are off in all blocks, in the arguments and in the constructors."""
    for table, part in _TABLES.items():
        groups: dict[str, list[dict]] = {}
        for block in arguments["blocks"].values():
            if block[part]["type"] != "none":
                groups.setdefault(block[part]["type"], []).append(block[part])
        facts.tables[table] = set(groups)
        for kind, all_ in groups.items():
            symbol = _class_of(table, kind)
            _leave_out(facts, symbol, all_)
    tree = dict(arguments)
    _leave_out(facts, DECODER, [tree])
    facts.parameters[DECODER.module, "Decoder.__init__"] |= {
        "init": ast.Constant("normal"),
        "mtp": ast.Constant(None),
    }
    arguments.clear()
    arguments.update(tree)


def _stored(facts: Facts, model: Decoder) -> None:
    """Parameters of constructors that are kept under their own name, as an attribute that is off in all instances."""
    for kind in {type(module) for module in model.modules() if isinstance(module, Module)}:
        symbol = Symbol(kind.__module__, kind.__name__)
        own = facts.own.get(kind.__name__, {})
        off = {name for name, value in own.items() if isinstance(value, _EMPTY) and not value}
        for part in source(symbol.module).definitions[symbol.name].body:
            if not (isinstance(part, ast.FunctionDef) and part.name == "__init__"):
                continue
            for name in off & {argument.arg for argument in part.args.kwonlyargs}:
                if f"self.{name} = {name}" in ast.unparse(part) or f"self.{name}," in ast.unparse(part):
                    value = ast.Constant(own[name])
                    facts.parameters.setdefault((symbol.module, f"{symbol.name}.__init__"), {})[name] = value


def _class_of(table: str, kind: str) -> Symbol:
    package = {"MIXERS": "fusedlm.nn.mixers", "FFNS": "fusedlm.nn.ffn"}[table]
    node = source(package).definitions[table].value
    name = next(v.id for k, v in zip(node.keys, node.values, strict=True) if k.value == kind)
    return resolve(package, name)


def _leave_out(facts: Facts, symbol: Symbol, all_: list[dict]) -> None:
    dropped = facts.parameters.setdefault((symbol.module, f"{symbol.name}.__init__"), {})
    for key in list(all_[0]):
        values = [arguments[key] for arguments in all_]
        if isinstance(values[0], _EMPTY) and not any(values) and len(set(map(type, values))) == 1:
            if not _takes(symbol, key):
                continue  # of a base class, which other classes may give another value
            if _rebinds(symbol, key):
                for arguments in all_:
                    del arguments[key]
                continue
            dropped[key] = ast.Constant(values[0])
            for arguments in all_:
                del arguments[key]


def _takes(symbol: Symbol, key: str) -> bool:
    """Whether a constructor names an argument."""
    for part in source(symbol.module).definitions[symbol.name].body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return key in {a.arg for a in [*part.args.args, *part.args.kwonlyargs]}
    return False


def _rebinds(symbol: Symbol, key: str) -> bool:
    """Whether a constructor gives an argument another value, so that its default is needed."""
    for part in source(symbol.module).definitions[symbol.name].body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            names = (node for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
            return key in {node.id for node in names}
    return False
