"""Folders that fusedlm wrote, known by content that nothing else writes: they are never text to train on."""

import json
import re
from pathlib import Path

_PREPARED = b'"format": "fusedlm prepared data"'
_LARGEST = 1 << 16  # bytes of the other files


def what_fusedlm_wrote(folder: Path) -> str | None:
    """"a run folder" or another name of what the folder is; None if fusedlm did not write it."""
    if _PREPARED in _start(folder / "manifest.json"):
        return "a prepared folder"
    meta = _read(folder / "tokenizer.meta.json")
    if meta.get("type") in ("bytes", "subword") and re.fullmatch("[0-9a-f]{64}", str(meta.get("fingerprint"))):
        return "a run folder"
    environment = _read(folder / "environment.json")
    if {"fusedlm", "torch", "device"} <= environment.keys():
        return "a run folder"
    if (folder / "experiment.yaml").is_file() and {"seeds", "variants"} <= _read(folder / "identity.json").keys():
        return "an experiment folder"
    return None


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST)
    except OSError:  # no such file, mostly; one that cannot be read is found when it is read as text
        return b""


def _read(path: Path) -> dict:
    try:
        content = json.loads(_start(path))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
