"""Seeded damage to files: bytes, lines, JSON values, YAML tokens, and what lies at a path."""

import json
import os
import random
import shutil
from pathlib import Path

# What breaks YAML readers: tags, aliases, merge keys, numbers of YAML 1.1, marks of documents, odd characters.
_YAML = (
    "*x",
    "&x {a: 1}",
    "<<: *x",
    '!!int ""',
    "!!float ''",
    "!!timestamp x",
    "!!python/object/apply:os.system ['true']",
    "!!binary =",
    "!!set {a}",
    "? [a]",
    "010",
    "1:30",
    "0x1F",
    "1_000",
    "1e400",
    "-.inf",
    ".nan",
    "~",
    "yes",
    "2001-01-01",
    "---",
    "...",
    "# x",
    "#x",
    "|",
    ">-",
    "'",
    '"',
    '"\\ud800"',
    "%YAML 1.1",
    "\t",
    "\u202e",
    "\x1b[2J",
    "\ufeff",
    "[" * 300,
    "{a: " * 300,
    "9" * 400,
    "1000000000",
    "-1",
    "2.5",
    "null",
    "[]",
    "{}",
)
_NUMBERS = (True, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, 0.5)
_JSON = (None, *_NUMBERS, "", "x", "../../x", "/etc/passwd", "\x00", "\x1b[2J", [], [1], {})


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """One random change to the bytes of a file."""
    kinds = ("flip", "flip", "flip", "bytes", "truncate", "append", "delete", "repeat", "zero", "swap", "empty")
    kind = draw.choice(kinds)
    if not content or kind == "empty":
        return draw.randbytes(draw.randint(0, 16)) if not content else b""
    data = bytearray(content)
    at = draw.randrange(len(data))
    end = min(len(data), at + draw.choice((1, 2, 8, 64, 512)))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        data[at:end] = draw.randbytes(end - at)
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += draw.randbytes(draw.choice((1, 7, 64)))
    elif kind == "delete":
        del data[at:end]
    elif kind == "repeat":
        data[at:at] = data[at:end]
    elif kind == "zero":
        data[at:end] = bytes(end - at)
    else:
        other = draw.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    return bytes(data)


def damage_lines(content: bytes, draw: random.Random) -> bytes:
    """Remove, repeat or swap lines."""
    lines = content.splitlines(keepends=True)
    if len(lines) < 2:
        return damage_bytes(content, draw)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(("remove", "repeat", "swap", "from"))
    if kind == "remove":
        del lines[at]
    elif kind == "repeat":
        lines.insert(other, lines[at])
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        del lines[max(1, at) :]
    return b"".join(lines)


def damage_yaml(content: bytes, draw: random.Random) -> bytes:
    """Put a token into YAML text in place of a value, as a new line, or anywhere."""
    lines = content.decode("utf-8", errors="replace").split("\n")
    token = draw.choice(_YAML)
    at = draw.randrange(len(lines))
    kind = draw.choice(("value", "value", "line", "anywhere"))
    if kind == "value" and ":" in lines[at]:
        lines[at] = f"{lines[at].partition(':')[0]}: {token}"
    elif kind == "line":
        lines.insert(at, " " * draw.choice((0, 2, 4)) + token)
    else:
        column = draw.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:column] + token + lines[at][column:]
    return "\n".join(lines).encode("utf-8", errors="replace")


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Change, remove, rename or add one value of a JSON document, or of one line of JSON Lines."""
    try:
        tree = json.loads(content)
    except ValueError:
        lines = content.splitlines(keepends=True)
        if len(lines) < 2:
            return damage_bytes(content, draw)
        at = draw.randrange(len(lines))
        lines[at] = damage_json(lines[at], draw).strip() + b"\n"
        return b"".join(lines)
    places = list(_places(tree))
    if not places:
        return json.dumps(draw.choice(_JSON)).encode()
    parent, key = draw.choice(places)
    kind = draw.choice(("value", "value", "near", "remove", "add"))
    if kind == "near" and isinstance(parent[key], int | float):
        parent[key] += draw.choice((-1, 1))
    elif kind == "remove":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent["other"] = draw.choice(_JSON)
    else:
        parent[key] = draw.choice(_JSON)
    return json.dumps(tree, indent=2).encode() + b"\n"


def _places(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)


def damage_path(path: Path, draw: random.Random) -> str:
    """Replace a file by something else: nothing, a folder, a link to nowhere or to itself, or a sibling's content."""
    kind = draw.choice(("missing", "folder", "dangling", "loop", "sibling", "sibling"))
    siblings = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    content = draw.choice(siblings).read_bytes() if siblings else b""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        os.symlink("nowhere", path)
    elif kind == "loop":
        os.symlink(path.name, path)
    elif kind == "sibling":
        path.write_bytes(content)
    return kind


def damage_file(path: Path, draw: random.Random) -> str:
    """Damage one file in a way that suits it; what was done, for the report."""
    kinds = ["bytes", "bytes", "bytes", "path"]
    if path.suffix in (".json", ".jsonl"):
        kinds += ["json"] * 4
    if path.suffix == ".yaml":
        kinds += ["yaml"] * 4
    if path.suffix in (".yaml", ".jsonl", ".txt"):
        kinds += ["lines"]
    kind = draw.choice(kinds)
    if kind == "path":
        return damage_path(path, draw)
    how = {"bytes": damage_bytes, "json": damage_json, "yaml": damage_yaml, "lines": damage_lines}[kind]
    path.write_bytes(how(path.read_bytes(), draw))
    return kind


def copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
