"""Docstrings of simplified code: without what they say of what is left out."""

import re
import textwrap
from collections.abc import Collection

WIDTH = 120
# Sentences with one of these are about training or serving in fusedlm.
_ELSEWHERE = re.compile(
    r"kernel|backend|fused|fuses|pending|static|CUDA|rollback|roll back|rolled back|`mark`|[Ll]oss on|`draft`|rank 0"
    r"|init_weights|init_state for|optimi[sz]er|compil|autocast|in_place|benchmark|\bwidens?\b|gradient|differentiated"
    r"|checkpoint|PendingProduct|reset_BT|quantised|replay|docs/|while training|[Rr]eports?\b|[Mm]etric"
    r"|targets|triton|paged?|float8|max_tokens|`summarise|accounting|fusedlm\.|append since|a law|at the start\b"
)
_ENTRY = re.compile(r"^(\*?[A-Za-z_][\w, *]*): (?=\S)")
_SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:")


def trimmed(docstring: str, indent: int, dropped: set[str], *, raises: bool) -> str:
    """The text of a docstring, or "".

    Args:
        indent: of the definition's body.
        dropped: names whose entries are left out.
        raises: whether it may have a section of what is raised.
    """
    lines = textwrap.dedent(" " * indent + docstring).strip().split("\n")
    found: list[str] = []
    section = None
    for block in _blocks(lines):
        if block[0] in _SECTIONS:
            section = block[0]
            if section == "Returns:":
                block = [section, "    " + " ".join(line.strip() for line in block[1:])]
            body = _entries(block[1:], dropped) if section != "Raises:" or raises else []
            if body:
                found.append("\n".join([section, *body]))
        elif block[0].startswith(" "):
            found.append("\n".join(block))
        elif all(_ENTRY.match(line) or line.startswith(" ") for line in block) and len(block) > 1:
            body = _entries(block, dropped)
            if body:
                found.append("\n".join(body))
        elif text := sentences(" ".join(line.strip() for line in block), dropped):
            found.append("\n".join(textwrap.wrap(text, WIDTH - indent - 6, break_long_words=False)))
    text = "\n\n".join(found)
    if "\n" not in text:
        return text
    margin = " " * indent
    body = "\n".join(margin + line if line else "" for line in text.split("\n")).lstrip()
    multiple = "\n\n" in text or any(text.startswith(name) for name in _SECTIONS) or _ENTRY.match(text)
    start = f"\n{margin}" if any(text.startswith(name) for name in _SECTIONS) else ""
    return f"{start}{body}\n{margin}" if multiple else body


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs; a section with what is indented below it is one."""
    found, current = [], []
    for line in lines:
        is_section = line in _SECTIONS
        if not line.strip() or is_section:
            if current:
                found.append(current)
            current = [line] if is_section else []
        else:
            current.append(line)
    return [*found, current] if current else found


def _entries(lines: list[str], dropped: set[str]) -> list[str]:
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    entries: list[list[str]] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == indent:
            entries.append([])
        entries[-1].append(line.strip())
    found = []
    for entry in entries:
        text = " ".join(entry)
        named = _ENTRY.match(text)
        if named:
            names = {name.strip(" *") for name in named.group(1).split(",")}
            if names <= dropped:
                continue
            rest = sentences(text[named.end() :], dropped)
            text = f"{named.group(1)}: {rest}" if rest else ""
        else:
            text = sentences(text, dropped)
        if text:
            margin = " " * indent
            found += textwrap.wrap(
                text, WIDTH - 8, initial_indent=margin, subsequent_indent=margin + "    ", break_long_words=False
            )
    return found


def sentences(text: str, dropped: Collection[str] = ()) -> str:
    """Without those about what is elsewhere, or about an argument that is left out."""
    parts = re.split(r"(?<=[.;]) +(?=[A-Z`(])", text)
    kept = [part for part in parts if not _ELSEWHERE.search(part) and not _is_of(part, dropped)]
    text = " ".join(kept)
    return f"{text[:-1]}." if text.endswith(";") else text


def _is_of(sentence: str, dropped: Collection[str]) -> bool:
    """Whether a sentence describes an argument that is left out, as in "hidden: None: 8/3 of dim"."""
    named = _ENTRY.match(sentence)
    return named is not None and {name.strip() for name in named.group(1).split(",")} <= set(dropped)
