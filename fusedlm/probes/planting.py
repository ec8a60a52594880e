"""Texts with planted sentences and questions about them at the end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# fmt: off
KEYS = (
    "Ararat", "Bergen", "Cadiz", "Delft", "Elba", "Fargo", "Genoa", "Havana", "Izmir", "Jaffa", "Kyoto",
    "Lagos", "Malta", "Narvik", "Oslo", "Perth", "Quito", "Riga", "Sparta", "Tunis", "Utrecht", "Verona",
    "Warsaw", "Yalta", "Zagreb", "Andes", "Baltic", "Corsica", "Danube", "Etna", "Ganges", "Hudson",
)
VALUES = (
    "amber", "badger", "cactus", "dahlia", "ermine", "falcon", "garnet", "heron", "indigo", "jasmine", "kestrel",
    "lilac", "maple", "nutmeg", "otter", "pepper", "quartz", "raven", "saffron", "thistle", "umber", "velvet",
    "walnut", "yarrow", "zinc", "beetle", "cobalt", "dragon", "ebony", "fennel", "ginger", "hazel",
)
# fmt: on


@dataclass(frozen=True)
class Fact:
    key: str
    value: str

    @staticmethod
    def draw(generator: np.random.Generator, n: int) -> "list[Fact]":
        """n facts whose keys all differ, and whose values all differ."""
        keys, values = (generator.choice(np.array(words), n, replace=False).tolist() for words in (KEYS, VALUES))
        return [Fact(key, value) for key, value in zip(keys, values, strict=True)]


@dataclass(frozen=True)
class Needle:
    """A fact as token ids: question, answer and end, which together are the planted sentence. Each is encoded alone,
    so that the answer has the same tokens in the sentence and after the question."""

    question: list[int]
    answer: list[int]
    end: list[int]

    @staticmethod
    def of(fact: Fact, tokenizer) -> "Needle":
        """Raises:
        ValueError: the tokenizer changes a word, so that answers could be guessed from what is left of them.
        """
        parts = (f" The code of {fact.key} is", f" {fact.value}", ".")
        return Needle(*(_encode(part, tokenizer) for part in parts))

    @staticmethod
    def longest(tokenizer) -> int:
        """Tokens of the longest sentence."""
        keys, values = (max(len(tokenizer.encode(f" {word}")) for word in words) for words in (KEYS, VALUES))
        return len(tokenizer.encode(" The code of")) + keys + len(tokenizer.encode(" is")) + values + 1

    @property
    def sentence(self) -> list[int]:
        return self.question + self.answer + self.end


def _encode(text: str, tokenizer) -> list[int]:
    ids = tokenizer.encode(text)
    if found := tokenizer.change(ids, text):
        raise ValueError(f"the tokenizer changes the sentence to recall at {found}; the probe needs one that keeps it")
    return ids


def plant(
    text: np.ndarray,
    planted: Sequence[tuple[float, Needle]],
    asked: Sequence[Needle],
    *,
    length: int,
    eot_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """End-of-text, text with sentences planted in it, then the questions, each with its answer.

    Args:
        text: (n,) tokens; the first ones fill what the sentences leave of the length.
        planted: depths in [0, 1] and needles; a sentence comes after that fraction of the text.
        asked: needles whose questions end the sequence, the last without the end of its sentence.

    Returns:
        tokens (length,) int64, and (length,) bool, True for tokens of the answers at the end.

    Raises:
        ValueError: the length is too short for the sentences, or the text for the length.
    """
    tail, scored = [], []
    for needle in asked:
        tail += needle.sentence
        scored += [False] * len(needle.question) + [True] * len(needle.answer) + [False] * len(needle.end)
    last = len(asked[-1].end)
    tail, scored = tail[: len(tail) - last], scored[: len(scored) - last]
    fixed = 1 + sum(len(needle.sentence) for _, needle in planted) + len(tail)
    room = length - fixed
    if room < 0:
        raise ValueError(f"length {length} does not hold a needle and its question, which have {fixed} tokens")
    if room > len(text):
        raise ValueError(f"length {length} needs {room} tokens of text; there are {len(text)}")
    parts, start = [[eot_id]], 0
    for depth, needle in sorted(planted, key=lambda pair: pair[0]):
        stop = round(depth * room)
        parts += [text[start:stop], needle.sentence]
        start = stop
    parts += [text[start:room], tail]
    tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    return tokens, np.array([False] * (length - len(scored)) + scored)
