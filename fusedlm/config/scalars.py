"""Plain scalars of YAML: the core schema of version 1.2.

What version 1.1, which many readers follow, takes for another value is refused: `010` is 8 there and 10 here.
"""

import re

from fusedlm.config.messages import shown

NULL, BOOL, INT, FLOAT, STR, MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "merge")
)
AMBIGUOUS = "tag:fusedlm:ambiguous"  # refused by `value`; strings of this form are quoted when written

_MAX_DIGITS = 100
_SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}

_PLAIN = [
    (NULL, r"null|Null|NULL|~|"),
    (BOOL, r"true|True|TRUE|false|False|FALSE"),
    (AMBIGUOUS, r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"),
    (AMBIGUOUS, r"[-+]?0[0-9_]+"),
    (AMBIGUOUS, r"[-+]?0[bB][01_]+|[-+]?0[oO][0-7_]+"),
    (AMBIGUOUS, r"[-+]0[xX][0-9a-fA-F_]+|0[xX](?=[^_]*_)[0-9a-fA-F_]+"),
    (AMBIGUOUS, r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"),
    (AMBIGUOUS, r"[-+]?(?=[^_]*_)(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"),
    (INT, r"[-+]?[0-9]+|0x[0-9a-fA-F]+"),
    (FLOAT, r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"),
    (FLOAT, r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    (MERGE, r"<<"),
]
_PATTERNS = [(tag, re.compile(pattern)) for tag, pattern in _PLAIN]


def plain_tag(text: str) -> str:
    """The tag of a plain scalar."""
    return next((tag for tag, pattern in _PATTERNS if pattern.fullmatch(text)), STR)


def value(tag: str, text: str):
    """The value of a scalar.

    Raises:
        ValueError: the tag is unknown or does not fit the text, or the text is ambiguous.
    """
    if tag in (STR, MERGE):
        return text
    if tag == AMBIGUOUS:
        raise ValueError(_describe_ambiguous(text))
    if tag not in (NULL, BOOL, INT, FLOAT):
        raise ValueError(unknown_tag(tag))
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a value of {len(text)} characters is not a number; put text in quotes")
    if plain_tag(text) != tag and not (tag == FLOAT and plain_tag(text) == INT):
        raise ValueError(f"{shown(text)} does not fit the tag !!{tag.rpartition(':')[2]}")
    if tag == NULL:
        return None
    if tag == BOOL:
        return text.lower() == "true"
    if tag == INT:
        return int(text, 16) if text.startswith("0x") else int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def unknown_tag(tag: str) -> str:
    """The problem with a tag."""
    return f"tag {shown(tag.replace('tag:yaml.org,2002:', '!!'))} is not supported; remove it"


def _describe_ambiguous(text: str) -> str:
    quoted = f"{text!r} in quotes for text" if len(text) <= _MAX_DIGITS else "it in quotes for text"
    digits = text.replace("_", "")
    if text.lower() in _SWITCHES:
        return f"{text} is {_SWITCHES[text.lower()]} in YAML 1.1 and text in YAML 1.2; write true, false or {quoted}"
    if re.fullmatch(r"[-+]?[0-9]{1,100}", digits):
        return f"{text} is not the same number in YAML 1.1 and 1.2; write {int(digits)}, or {quoted}"
    return f"{text[:_MAX_DIGITS]} is not the same in YAML 1.1 and 1.2; write a decimal number, or {quoted}"
