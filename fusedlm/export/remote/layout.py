"""Syntax trees as text: comments back in their places, lines of at most 120 characters."""

import ast
import builtins
import io
import re
import tokenize
from collections.abc import Callable

from fusedlm.export.remote.source import COMMENTS

WIDTH = 120
_MARK = "COMMENT_"
_OPENING, _CLOSING = "([{", ")]}"
_DEFAULT = re.compile(r"^(\w+: [^=]+)=(?=[^=])")


def text_of(node: ast.stmt) -> str:
    """A definition as text, without trailing newline."""
    marker = _Marker()
    lines = ast.unparse(ast.fix_missing_locations(marker.visit(node))).split("\n")
    found, in_docstring, of_class = [], False, False
    for i, line in enumerate(lines):
        stripped = line.strip()
        quotes = stripped.count('"""')
        if in_docstring or quotes:
            of_class |= quotes > 0 and lines[i - 1].startswith("class ")
            in_docstring ^= quotes == 1
            found.append(line.rstrip())
            if of_class and not in_docstring and lines[i + 1].strip():
                found.append("")
            of_class &= in_docstring
        elif stripped.startswith(_MARK):
            found.append(line[: len(line) - len(line.lstrip())] + marker.comments[int(stripped[len(_MARK) :])])
        else:
            found += wrapped(_plain(line))
    return "\n".join(found)


class _Marker(ast.NodeTransformer):
    """Puts a name before each statement for each of its comments, and an empty line after a docstring of a class."""

    def __init__(self):
        self.comments: list[str] = []

    def generic_visit(self, node):
        super().generic_visit(node)
        for name in ("body", "orelse"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [part for statement in statements for part in self.marked(statement)])
        return node

    def marked(self, statement: ast.stmt) -> list[ast.stmt]:
        marks = []
        for comment in getattr(statement, COMMENTS, []):
            marks.append(ast.Expr(ast.Name(f"{_MARK}{len(self.comments)}", ast.Load())))
            self.comments.append(comment)
        return [*marks, statement]


def _plain(line: str) -> str:
    """With double quotes, and without brackets around a tuple."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except (tokenize.TokenError, IndentationError):
        tokens = []
    for string in {token.string for token in tokens if token.type == tokenize.STRING}:
        if string.startswith("'") and '"' not in string and "\\" not in string:
            line = line.replace(string, f'"{string[1:-1]}"')
    if match := re.match(r"^(\s*(?:return|.* (?:=|in)) )\((.*)\)(:?)$", line):
        head, inside, colon = match.groups()
        spans = _spans(line)
        if (len(head), len(line) - 1 - len(colon)) in spans and len(_split(inside)) > 1 and not _is_generator(inside):
            return f"{head}{inside}{colon}"
    return line


def wrapped(line: str) -> list[str]:
    """A line cut at its widest brackets where it is too long, again and again."""
    is_definition = line.lstrip().startswith("def ")
    if is_definition:
        line = _with_spaced_defaults(line)
    if len(line) <= WIDTH:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    if " = " in line and not is_definition and (bare := _bracketed(line)):
        line = bare
    spans = [span for span in _spans(line) if span[1] - span[0] > 1]
    if not spans:
        return [line]
    start, end = spans[0] if is_definition else max(spans, key=lambda span: span[1] - span[0])
    head, inside, tail = line[: start + 1], line[start + 1 : end].strip(), line[end:]
    one = f"{indent}    {inside}"
    if _is_generator(inside):
        inner = inside[1:-1] if (0, len(inside) - 1) in _spans(inside) else inside
        parts = [x for part in _clauses(inner) for x in wrapped(f"{indent}    {part}")]
    elif len(one) <= WIDTH and not is_definition:
        parts = [one]
    else:
        items = _split(inside)
        comma = "," if len(items) > 1 else ""
        parts = [x for item in items for x in wrapped(f"{indent}    {item.strip()}{comma}")]
    return [head, *parts, *wrapped(f"{indent}{tail.strip()}")]


def _bracketed(line: str) -> str | None:
    """`a, b = x, y` with brackets around the right side, which can be cut."""
    head, _, value = line.partition(" = ")
    return f"{head} = ({value})" if len(_split(value)) > 1 else None


def _with_spaced_defaults(line: str) -> str:
    start, end = _spans(line)[0]
    arguments = [_DEFAULT.sub(r"\1 = ", argument.strip()) for argument in _split(line[start + 1 : end])]
    return f"{line[: start + 1]}{', '.join(arguments)}{line[end:]}"


def _outside(text: str) -> list[tuple[int, str, int]]:
    """(index, character, depth of brackets) of what is outside of strings."""
    found, depth, quote = [], 0, None
    for i, character in enumerate(text):
        if quote:
            quote = None if character == quote and text[i - 1] != "\\" else quote
            continue
        if character in "'\"":
            quote = character
        depth -= character in _CLOSING
        found.append((i, character, depth))
        depth += character in _OPENING
    return found


def _spans(line: str) -> list[tuple[int, int]]:
    """Start and end of the outermost brackets."""
    places = [(i, character) for i, character, depth in _outside(line) if depth == 0]
    opening = [i for i, character in places if character in _OPENING]
    closing = [i for i, character in places if character in _CLOSING]
    return list(zip(opening, closing, strict=False))


def _split(inside: str) -> list[str]:
    """At the commas outside of brackets."""
    commas = [i for i, character, depth in _outside(inside) if character == "," and depth == 0]
    parts = [inside[a:b] for a, b in zip([0, *(i + 1 for i in commas)], [*commas, len(inside)], strict=True)]
    return [part for part in parts if part.strip()]


def _is_generator(inside: str) -> bool:
    if (0, len(inside) - 1) in _spans(inside):
        inside = inside[1:-1]
    return len(_clauses(inside)) > 1


def _clauses(text: str) -> list[str]:
    """Element, `for` and `if` of a comprehension."""
    level = "".join(c if d == 0 else "\0" for c, d in _padded(text))
    starts = [match.start() + 1 for match in re.finditer(r" (?=for \w)", level)]
    if not starts:
        return [text]
    starts += [m.start() + 1 for m in re.finditer(r" (?=if )", level) if m.start() > starts[0]]
    places = [0, *sorted(starts), len(text)]
    return [text[a:b].strip() for a, b in zip(places, places[1:], strict=False)]


def _padded(text: str) -> list[tuple[str, int]]:
    known = {i: (character, depth) for i, character, depth in _outside(text)}
    return [known.get(i, ("\0", 1)) for i in range(len(text))]


def known_annotation(node: ast.expr | None, is_known: Callable[[str], bool]) -> ast.expr | None:
    """An annotation without the classes that are not there; None: nothing is left."""
    if node is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = known_annotation(node.left, is_known), known_annotation(node.right, is_known)
        if left is None or right is None:
            rest = left or right
            return None if isinstance(rest, ast.Constant) else rest
        return ast.BinOp(left, ast.BitOr(), right)
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        names = {node.value}
    return node if all(hasattr(builtins, name) or is_known(name) for name in names) else None
