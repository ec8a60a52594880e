"""Tasks by the names of lm-eval, or from files that need no network."""

import json
from pathlib import Path

import yaml

_CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
_CONTINUATION = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


def find_tasks(names: list[str]) -> list[str | dict]:
    """What `lm_eval.simple_evaluate` takes: names as they are, and files as configurations.

    A file is the YAML of a task of lm-eval, whose `data_files` are relative to it, or JSONL of one task: objects with
    `query`, `choices` and `gold` (the index of the right one), or with `context` and `continuation`.

    Raises:
        ValueError: a file cannot be read or is none of these; names it.
    """
    found, seen = [], set()
    for name in names:
        task = _from_file(Path(name).expanduser()) if name.endswith((".yaml", ".yml", ".jsonl")) else name
        key = task["task"] if isinstance(task, dict) else task
        if not key or key in seen:
            raise ValueError(f"--tasks {','.join(names)}: {key!r} is given twice or empty")
        seen.add(key)
        found.append(task)
    return found


def _from_file(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"task {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"task {path}: byte {error.start} is not UTF-8") from None
    return _from_jsonl(path, text) if path.suffix == ".jsonl" else _from_yaml(path, text)


def _from_jsonl(path: Path, text: str) -> dict:
    form = None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = _form(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"task {path} line {number}: {' '.join(str(error).split())}") from None
        if form not in (None, found):
            raise ValueError(f"task {path} line {number}: other keys than in the lines before")
        form = found
    if form is None:
        raise ValueError(f"task {path}: holds no question")
    return {"task": path.stem, "target_delimiter": " ", **_local(path)} | (
        _CHOICES if form == "choices" else _CONTINUATION
    )


def _form(entry) -> str:
    """Raises ValueError if this is no question."""
    if isinstance(entry, dict):
        query, choices, gold = (entry.get(key) for key in ("query", "choices", "gold"))
        if isinstance(query, str) and isinstance(choices, list) and all(isinstance(c, str) and c for c in choices):
            if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices):
                return "choices"
            raise ValueError(f"gold={gold!r} must be the index of one of {len(choices)} choices")
        if all(isinstance(entry.get(key), str) and entry[key] for key in ("context", "continuation")):
            return "continuation"
    raise ValueError("must have the keys query, choices and gold, or context and continuation")


def _from_yaml(path: Path, text: str) -> dict:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"task {path}: not YAML without tags ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("task"), str):
        raise ValueError(f"task {path}: must be the configuration of one task, with the key task")
    if tree.get("dataset_path") != "json":
        return tree
    options = tree.setdefault("dataset_kwargs", {})
    files = options.get("data_files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"task {path}: dataset_path json needs dataset_kwargs.data_files, files by split")
    options["data_files"] = {split: str(path.parent / Path(file)) for split, file in files.items()}
    return tree


def _local(path: Path) -> dict:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
    }
