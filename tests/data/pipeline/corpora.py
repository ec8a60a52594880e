"""A small corpus with planted duplicates and leaks, and what preparing it gives."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np

from fusedlm.config.data import DataConfig
from fusedlm.data.shards import PreparedData
from fusedlm.data.split import content_digest, is_held_out

FRACTION = 0.2
_WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 8)) for i in range(2000)]


def text(seed: int, n_words: int = 120) -> str:
    """Words that no other seed has in this order, in lines."""
    words = random.Random(f"text {seed}").choices(_WORDS, k=n_words)
    return "\n".join(" ".join(words[i : i + 12]) for i in range(0, n_words, 12)) + f"\nÜber {seed} naïve 😀."


def edited(original: str, seed: int, n_words: int = 2) -> str:
    """With a few words replaced: of 120, about 0.84 of the 5-grams of both together remain."""
    words = original.split(" ")
    for place in random.Random(f"edit {seed}").sample(range(1, len(words) - 1), n_words):
        words[place] = f"edited{seed}"
    return " ".join(words)


def held_out(document: str, seed: int = 0) -> bool:
    return is_held_out(content_digest(document), FRACTION, seed)


def seeds(wanted: bool, n: int, start: int = 0) -> list[int]:
    """Seeds of texts that are, or are not, held out."""
    found = (seed for seed in range(start, start + 100 * n) if held_out(text(seed)) == wanted)
    return [next(found) for _ in range(n)]


def write(folder: Path, documents: list[str], n_files: int = 5) -> Path:
    """JSON Lines; consecutive documents in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(documents) // n_files)
    for i in range(n_files):
        lines = [json.dumps({"text": document}) + "\n" for document in documents[i * size : (i + 1) * size]]
        (folder / f"part-{i}.jsonl").write_text("".join(lines))
    return folder


def settings(text: Path, prepared: Path, pipeline: dict | None = None, **data) -> DataConfig:
    if pipeline is not None:
        data["pipeline"] = {"executor": {"type": "local", "workers": 1}} | pipeline
    defaults = {
        "source": {"type": "jsonl", "path": str(text)},
        "split": {"type": "hash", "fraction": FRACTION},
        "tokenizer": {"type": "bpe", "vocab_size": 400},
        "shard_tokens": 3000,
        "dir": str(prepared),
    }
    return DataConfig(**(defaults | data))


def stored(prepared: PreparedData, split: str) -> list[str]:
    shards = getattr(prepared, split)
    return [prepared.tokenizer.decode(tokens[1:]) for tokens, _ in shards.documents()]


def digests(folder: Path, *without: str) -> dict[str, str]:
    """sha256 of every file."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in without)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def count_common_spans(documents: list[np.ndarray], others: list[np.ndarray], length: int) -> int:
    """How many spans of `length` tokens of the others are in the documents."""
    spans = {tuple(one[i : i + length]) for one in others for i in range(len(one) - length + 1)}
    return sum(tuple(one[i : i + length]) in spans for one in documents for i in range(len(one) - length + 1))
