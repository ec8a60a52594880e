"""Which text is held out."""

import hashlib
from collections.abc import Iterator

from fusedlm.config.data import HashSplit, TailSplit

TRAIN, VALIDATION = "train", "validation"


def content_digest(text: str) -> bytes:
    """sha256 of a text without the white space around it: copies that differ by a last line end are the same
    document."""
    return hashlib.sha256(text.strip().encode()).digest()


def split_document(text: str, config: HashSplit | TailSplit) -> Iterator[tuple[str, str]]:
    """The parts of a document as (split, text).

    By hash, a document and all copies of it go to one side. By tail, the first int(characters * (1 - fraction))
    characters go to training; a part of white space alone is left out.
    """
    if isinstance(config, HashSplit):
        position = int.from_bytes(content_digest(text)[:8], "big") / 2**64
        yield (VALIDATION if position < config.fraction else TRAIN), text
        return
    cut = int(len(text) * (1 - config.fraction))
    for split, part in ((TRAIN, text[:cut]), (VALIDATION, text[cut:])):
        if part and not part.isspace():
            yield split, part
