"""Splitting text into training and validation."""

import hashlib
from collections.abc import Iterator

from fusedlm.config.data import HashSplit, TailSplit

TRAIN, VALIDATION = "train", "validation"


def content_digest(text: str) -> bytes:
    """sha256 of a text without leading and trailing white space: copies that differ in a final line end have the same
    digest."""
    return hashlib.sha256(text.strip().encode()).digest()


def is_held_out(digest: bytes, fraction: float, seed: int = 0) -> bool:
    """Whether a split by hash holds out the documents with this `content_digest`: a function of seed and content.

    Args:
        seed: of the choice; 0: the digest itself chooses.
    """
    if seed:
        digest = hashlib.sha256(seed.to_bytes(8, "big") + digest).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def split_document(text: str, config: HashSplit | TailSplit) -> Iterator[tuple[str, str]]:
    """Yields the parts of a document as (split, text).

    By hash, a document and all its copies go to one split. By tail, the first int(characters * (1 - fraction))
    characters go to training. A part that is only white space is dropped.
    """
    if isinstance(config, HashSplit):
        yield (VALIDATION if is_held_out(content_digest(text), config.fraction) else TRAIN), text
        return
    cut = int(len(text) * (1 - config.fraction))
    for split, part in ((TRAIN, text[:cut]), (VALIDATION, text[cut:])):
        if part and not part.isspace():
            yield split, part
