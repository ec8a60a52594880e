"""The file for Transformers of one model."""

import ast
from dataclasses import dataclass

import torch

from fusedlm.config.model import ModelConfig
from fusedlm.export.remote.docstrings import trimmed
from fusedlm.export.remote.facts import ATTRIBUTES, NOT_NONE, READ_ELSEWHERE, Facts
from fusedlm.export.remote.layout import known_annotation, text_of
from fusedlm.export.remote.link import Linker, Scoped
from fusedlm.export.remote.source import External, Submodule, Symbol, resolve, source
from fusedlm.model import Decoder, build_model
from fusedlm.nn.module import Module, roles
from fusedlm.runs.state import model_tensors

MODELING, RUNTIME = "fusedlm.export.remote.modeling", "fusedlm.export.remote.runtime"
FILE, CONFIG_CLASS, MODEL_CLASS, MODEL_TYPE = "modeling_fusedlm.py", "FusedLMConfig", "FusedLMForCausalLM", "fusedlm"
PREFIX = "model."  # of the names of its tensors
_CLASSES = (CONFIG_CLASS, "FusedLMCache", MODEL_CLASS)
_DECODER = Symbol("fusedlm.model.decoder", "Decoder")
_TABLES = {"MIXERS": "mixer", "FFNS": "ffn"}
_EMPTY = (type(None), bool)
_UNROUNDED = ("per_head", "bias", "lambda", "router")  # kinds of parameters
PADDED = ("embedding.weight", "head.weight", "value_table.weight")  # rows of the vocabulary


@dataclass(frozen=True)
class RemoteCode:
    """A model as code and tensors.

    text: the file. keys: of config.json. model: the model section of the tensors. unrounded: those of them that stay in
    float32.
    """

    text: str
    keys: dict
    model: ModelConfig
    tensors: dict[str, torch.Tensor]
    unrounded: set[str]


def remote_code(model: Decoder, config: ModelConfig) -> RemoteCode:
    """Without modules of multi-token prediction and rows of padding.

    Args:
        config: that the decoder was built from.
    """
    config = config.model_copy(update={"mtp": None})
    text, keys = remote_model(config, model.vocab_size)
    keys |= {
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{FILE.removesuffix('.py')}.{CONFIG_CLASS}",
            "AutoModelForCausalLM": f"{FILE.removesuffix('.py')}.{MODEL_CLASS}",
        },
        "tie_word_embeddings": config.tie_embeddings,
    }
    tensors = {}
    for name, tensor in model_tensors(model).items():
        if not name.startswith(("mtp.", "mtp_")):
            is_table = name in PADDED
            tensors[PREFIX + name] = tensor.detach()[: model.vocab_size] if is_table else tensor.detach()
    unrounded = {name for name in tensors if any(part in name for part in _unrounded(model))}
    return RemoteCode(text, keys, config, tensors, unrounded)


def _unrounded(model: Decoder) -> set[str]:
    """Parts of the names of parameters whose rounding would cost more than that of activations. Transformers searches
    for them anywhere in a name, so that each has two of its components."""
    names = {name for name, role in roles(model).items() if role.kind in _UNROUNDED}
    routers = {name.removesuffix(".weight").removesuffix(".project") for name in names if name.endswith("weight")}
    return {".".join(name.split(".")[-2:]) for name in routers | {n for n in names if not n.endswith("weight")}}


def remote_model(config: ModelConfig, vocab_size: int) -> tuple[str, dict]:
    """The file, and what config.json has for it beside the size of the vocabulary: `arguments` and `scales`.

    Args:
        config: of a model without multi-token prediction.
    """
    model = build_model(config, vocab_size=vocab_size, device="meta")
    arguments = _arguments(config, model)
    facts = Facts()
    facts.own, facts.everywhere = _attributes(model)
    _choose(facts, arguments)
    _stored(facts, model)
    # Distributions of the start, which parameters here do not have.
    facts.parameters["fusedlm.nn.linear", "Linear.__init__"] = {"init": ast.Constant(True)}
    if config.yarn is None:
        facts.names["yarn"] = None
    linker = Linker(
        [Symbol(MODELING, name) for name in _CLASSES],
        facts,
        verbatim=MODELING,
        grafts={(_DECODER, "forward"): Symbol(RUNTIME, "decoder_forward")},
        substitutes={Symbol("fusedlm.nn.module", "Module"): Symbol(RUNTIME, "Module")},
    ).link()
    text = _Writer(linker, config, model).text()
    return text, {"arguments": arguments, "scales": _scales(config, model)}


def _arguments(config: ModelConfig, model: Decoder) -> dict:
    """Those of the decoder, of the blocks that the pattern uses."""
    tree = config.model_dump()
    del tree["mup"], tree["mtp"]
    # Of use at the start of training alone.
    del tree["init"]
    tree["vocab_multiple"] = 1
    tree["blocks"] = {name: tree["blocks"][name] for name in dict.fromkeys(model.layer_names)}
    return tree


def _scales(config: ModelConfig, model: Decoder) -> dict[str, float]:
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
            groups.setdefault(block[part]["type"], []).append(block[part])
        facts.tables[table] = set(groups)
        for kind, all_ in groups.items():
            symbol = _class_of(table, kind)
            _leave_out(facts, symbol, all_)
    tree = dict(arguments)
    _leave_out(facts, _DECODER, [tree])
    facts.parameters[_DECODER.module, "Decoder.__init__"] |= {
        "init": ast.Constant("normal"),
        "mtp": ast.Constant(None),
    }
    arguments.clear()
    arguments.update(tree)


def _stored(facts: Facts, model: Decoder) -> None:
    """Parameters of constructors that are kept under their own name, as an attribute that is off in all instances."""
    for kind in {type(module) for module in model.modules() if isinstance(module, Module)}:
        symbol = Symbol(kind.__module__, kind.__name__)
        off = {name for name, value in facts.own.get(kind.__name__, {}).items() if isinstance(value, _EMPTY) and not value}
        for part in source(symbol.module).definitions[symbol.name].body:
            if not (isinstance(part, ast.FunctionDef) and part.name == "__init__"):
                continue
            for name in off & {argument.arg for argument in part.args.kwonlyargs}:
                if f"self.{name} = {name}" in ast.unparse(part) or f"self.{name}," in ast.unparse(part):
                    value = ast.Constant(facts.own[kind.__name__][name])
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


class _Writer:
    def __init__(self, linker: Linker, config: ModelConfig, model: Decoder):
        self.linker, self.config, self.model = linker, config, model
        self.externals = set(linker.externals)
        self.names = _names(linker)

    def text(self) -> str:
        sections = []
        for module in self._modules():
            found = source(module)
            symbols = [symbol for symbol in self.linker.nodes if symbol.module == module]
            symbols.sort(key=lambda symbol: found.definitions[symbol.name].lineno)
            parts = [self._definition(symbol) for symbol in symbols]
            if module != MODELING:
                first = " ".join(found.docstring.split()).split(". ")[0].rstrip(".") + "."
                parts[0] = "\n".join(_commented(first)) + "\n\n\n" + parts[0]
            sections.append(_joined(parts))
        sections[-1] = sections[-1].replace(
            "_keep_in_fp32_modules_strict = []", f"_keep_in_fp32_modules_strict = {sorted(_unrounded(self.model))}"
        )
        tail = "\n".join(ast.unparse(statement) for statement in source(MODELING).statements)
        return "\n\n\n".join([self._header(), *sections, tail]).replace(": list = []", " = []") + "\n"

    def _header(self) -> str:
        mixers = ", ".join(dict.fromkeys(self.config.blocks[n].mixer.type for n in self.model.layer_names))
        ffns = ", ".join(dict.fromkeys(self.config.blocks[n].ffn.type for n in self.model.layer_names))
        lines = [
            '"""A language model of fusedlm for Transformers: ' + f"{mixers}; {ffns}.",
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
        from fusedlm.export.remote.link import _bound

        self._bound.append(_bound(node))
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


def _commented(text: str) -> list[str]:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) + 3 > 118:
            lines.append("")
        lines[-1] += f" {word}"
    return [f"#{line}" for line in lines]


def _joined(parts: list[str]) -> str:
    """Two blank lines around functions and classes, none between constants."""
    found = parts[0]
    for before, part in zip(parts, parts[1:], strict=False):
        is_block = any("\n" in one and ("def " in one or "class " in one) for one in (before, part))
        found += ("\n\n\n" if is_block else "\n") + part
    return found


