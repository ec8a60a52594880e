"""A corpus with planted duplicates and held-out text, and what a preparation of it left.

No text is written but into the folder that is given.
"""

import json
import lzma
import random
from dataclasses import dataclass, field
from pathlib import Path

from fusedlm.data.split import content_digest, is_held_out

SEPARATOR = "\n<|endoftext|>\n"
EDITED_WORDS = 3
PASSAGE_WORDS = 80


@dataclass
class Planted:
    """Documents by identifier, and what was planted.

    Attributes:
        texts: all, in the order of the files.
        exact, near: copy -> original; a near copy has EDITED_WORDS words replaced.
        leaks: training documents with a passage of PASSAGE_WORDS words of a held-out document.
        similarity: of each near copy and its original: Jaccard similarity of their 5-grams of words.
    """

    texts: dict[str, str]
    exact: dict[str, str] = field(default_factory=dict)
    near: dict[str, str] = field(default_factory=dict)
    leaks: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)


def read_documents(path: Path, megabytes: float) -> list[str]:
    """Documents of a text file, plain or .xz, up to so many bytes."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read(int(megabytes * 1e6))
    documents = [document for document in text.split(SEPARATOR)[:-1] if len(document.split()) >= 2 * PASSAGE_WORDS]
    return list(dict.fromkeys(documents))


def plant(documents: list[str], fraction: float, seed: int) -> Planted:
    """Add 10% exact copies and 10% near copies of training documents, and passages of held-out documents to 1% of the
    training documents.

    Args:
        fraction: of documents that are held out, by a hash.
    """
    draw = random.Random(seed)
    held_out = [document for document in documents if is_held_out(content_digest(document), fraction)]
    training = [document for document in documents if not is_held_out(content_digest(document), fraction)]
    texts = {f"document {i}": document for i, document in enumerate(documents)}
    names = {document: name for name, document in texts.items()}
    chosen = draw.sample(training, len(training) * 21 // 100)
    n = len(training) // 10
    found = Planted(texts)
    for i, original in enumerate(chosen[:n]):
        found.exact[f"exact {i}"] = names[original]
        texts[f"exact {i}"] = original
    for i, original in enumerate(chosen[n : 2 * n]):
        copy = _on_training_side(lambda one=original: _edit(one, draw), fraction)
        found.near[f"near {i}"] = names[original]
        found.similarity[f"near {i}"] = _similarity(original, copy)
        texts[f"near {i}"] = copy
    for original in chosen[2 * n :]:
        name = names[original]
        texts[name] = _on_training_side(lambda one=original: _insert(one, draw.choice(held_out), draw), fraction)
        found.leaks.append(name)
    order = list(texts)
    draw.shuffle(order)
    found.texts = {name: texts[name] for name in order}
    return found


def write_files(texts: dict[str, str], folder: Path, n_files: int) -> int:
    """JSON Lines; the bytes of text."""
    folder.mkdir(parents=True)
    files = [open(folder / f"part-{i:03d}.jsonl", "w", encoding="utf-8") for i in range(n_files)]  # noqa: SIM115
    per_file = -(-len(texts) // n_files)
    for number, (name, text) in enumerate(texts.items()):
        files[number // per_file].write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    for file in files:
        file.close()
    return sum(len(text.encode()) for text in texts.values())


def judge(planted: Planted, clean: dict[str, str], kept: list[str], kept_clean: list[str], fraction: float) -> dict:
    """Recall of what was planted, and precision of what was removed.

    Args:
        clean: documents without what was planted, by identifier.
        kept, kept_clean: texts that are left of the two, both splits.
    """
    left, left_clean = _count(kept), _count(kept_clean)
    # Wikipedia repeats itself: what is removed of the clean text too was not planted, and is no error.
    natural = {name for name, text in clean.items() if text not in left_clean}
    exact = sum(left.get(planted.texts[copy], 0) <= 1 for copy in planted.exact)
    near = sum(
        (planted.texts[copy] in left) + (planted.texts[original] in left) <= 1
        for copy, original in planted.near.items()
    )
    leaks = sum(planted.texts[name] not in left for name in planted.leaks)
    involved = {*planted.leaks, *planted.near.values()}
    wrong = [
        name
        for name, text in planted.texts.items()
        if name.startswith("document") and name not in involved and name not in natural and text not in left
    ]
    removed = len(planted.texts) - len(kept)
    return {
        "documents": len(planted.texts),
        "removed": removed,
        "removed_of_the_clean_text": len(natural),
        "exact": {"planted": len(planted.exact), "removed": exact},
        "near": {
            "planted": len(planted.near),
            "removed": near,
            "mean_similarity": sum(planted.similarity.values()) / len(planted.similarity),
            "expected": sum(1 - (1 - s**8) ** 14 for s in planted.similarity.values()),
        },
        "leaks": {"planted": len(planted.leaks), "removed": leaks},
        "wrongly_removed": len(wrong),
        "precision": 1 - len(wrong) / removed,
    }


def spans_left(training: list, held_out: list, length: int) -> int:
    """Spans of so many tokens of held-out documents that are in training documents, by comparison of the tokens."""
    size = held_out[0].itemsize * length
    spans = set()
    for tokens in held_out:
        raw = tokens.tobytes()
        spans.update(raw[i : i + size] for i in range(0, len(raw) - size + 1, tokens.itemsize))
    left = 0
    for tokens in training:
        raw = tokens.tobytes()
        left += sum(raw[i : i + size] in spans for i in range(0, len(raw) - size + 1, tokens.itemsize))
    return left


def _on_training_side(make, fraction: float) -> str:
    while is_held_out(content_digest(text := make()), fraction):
        pass
    return text


def _edit(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    for place in draw.sample(range(len(words)), EDITED_WORDS):
        words[place] = draw.choice(words)
    return " ".join(words)


def _insert(text: str, other: str, draw: random.Random) -> str:
    words, others = text.split(" "), other.split(" ")
    start = draw.randrange(max(1, len(others) - PASSAGE_WORDS))
    place = draw.randrange(len(words))
    return " ".join([*words[:place], *others[start : start + PASSAGE_WORDS], *words[place:]])


def _similarity(a: str, b: str) -> float:
    first, second = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (a.lower().split(), b.lower().split()))
    return len(first & second) / len(first | second)


def _count(texts: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return counts
