"""A config.json, read with checks: whatever is in it, an error names the file, the key and the value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REQUIRED = object()


class ConfigJSON:
    """The keys of a config.json, or of a section of it. A key that is null counts as absent."""

    def __init__(self, tree: Mapping[str, Any], path: Path | str, where: str = ""):
        self.tree, self.path, self._where = tree, path, where

    def has(self, key: str) -> bool:
        return self.tree.get(key) is not None

    def refusal(self, key: str, reason: str) -> ValueError:
        """An error about the value of a key."""
        return ValueError(f"{self.path}: {self._where}{key}={json.dumps(self.tree.get(key))[:80]}: {reason}")

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._get(key, default, lambda value: type(value) is int, "an integer")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default, lambda value: type(value) in (int, float), "a number")
        return float(value) if type(value) is int else value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._get(key, default, lambda value: isinstance(value, str), "text")

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._get(key, default, lambda value: isinstance(value, bool), "true or false")

    def texts(self, key: str) -> list[str] | None:
        """A list of text; None: there is none."""
        return self._get(key, None, _is_list_of_text, "a list of text")

    def integers(self, key: str) -> list[int] | None:
        """A list of integers; None: there is none."""
        return self._get(key, None, _is_list_of_integers, "a list of integers")

    def section(self, key: str) -> "ConfigJSON | None":
        tree = self._get(key, None, lambda value: isinstance(value, dict), "an object")
        return None if tree is None else ConfigJSON(tree, self.path, f"{self._where}{key}.")

    def must_be(self, key: str, value: Any, reason: str, *, default: Any = None) -> None:
        """Raises ValueError unless a key has this value, or is absent and the class has it by default.

        Args:
            default: of the class.
        """
        found = self.tree.get(key) if self.has(key) else default
        if found != value:
            raise ValueError(f"{self.path}: {self._where}{key}={json.dumps(found)[:80]}: {reason}")

    def _get(self, key: str, default: Any, fits, kind: str) -> Any:
        value = self.tree.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.path}: {self._where}{key} is missing")
            return default
        if not fits(value):
            raise self.refusal(key, f"must be {kind}")
        return value


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_list_of_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int for part in value)
