"""Values and names in error messages: one line, of bounded length, without control and bidirectional characters."""

_MAX_SHOWN = 100  # characters
_MAX_NAMES = 4


def shown(value) -> str:
    """A value as Python writes it; a list or a mapping by its type."""
    if isinstance(value, dict | list):
        return repr(type(value).__name__)
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...{text[-1] if isinstance(value, str) else ''}"


def printable(text: str, longest: int = _MAX_SHOWN) -> str:
    """Text without quotes."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: longest + 1])
    return text if len(text) <= longest else f"{text[:longest]}..."


def either(names: list[str]) -> str:
    """`a, b or c`, of the first few."""
    names = names if len(names) <= _MAX_NAMES else [*names[: _MAX_NAMES - 1], "others"]
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
