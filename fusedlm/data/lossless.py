"""Tokenizers that lose text. Bits per byte divide by the bytes of the text, so they are wrong when the model predicts
less than the text, such as its lower case."""

import logging

import numpy as np

_log = logging.getLogger(__name__)

_SHOWN = 24  # bytes on each side of a change
REMEDY = "use a tokenizer that keeps every byte, such as data.tokenizer.type=bpe or bytes"


def change(raw: bytes, decoded: bytes) -> str | None:
    """What a tokenizer does to a text: `byte 4: 'the Union' becomes 'the union'`. None: nothing.

    Args:
        raw: the text in UTF-8.
        decoded: the bytes of its tokens.
    """
    if raw == decoded:
        return None
    length = min(len(raw), len(decoded))
    differing = np.frombuffer(raw, np.uint8, length) != np.frombuffer(decoded, np.uint8, length)
    at = int(differing.argmax()) if differing.any() else length
    start = max(0, at - _SHOWN)
    before, after = (text[start : at + _SHOWN].decode("utf-8", errors="ignore") for text in (raw, decoded))
    return f"byte {at}: {before!r} becomes {after!r}"


class LossCheck:
    """Compares each text with the decoded tokens: every held-out text, and training texts where it is not certain that
    the tokenizer keeps them.

    Args:
        tokenizer: that made the tokens.

    Attributes:
        lossy: training texts that were changed.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._held_out = self._trained = self.lossy = 0
        self._first = ""

    def held_out(self, ids: np.ndarray, raw: bytes, source: str) -> None:
        """Check the next held-out text.

        Raises:
            ValueError: the tokenizer changes it; names the document and the byte.
        """
        self._held_out += 1
        if found := change(raw, self._tokenizer.decode_bytes(ids)):
            raise ValueError(
                f"{source}: the tokenizer changes held-out document {self._held_out} at {found}; bits per byte would "
                f"be wrong; {REMEDY}"
            )

    def training(self, ids: np.ndarray, raw: bytes) -> None:
        """Count the next training text if the tokenizer changes it."""
        self._trained += 1
        if self._tokenizer.keeps_text:
            return
        if found := change(raw, self._tokenizer.decode_bytes(ids)):
            self._first = self._first or f"document {self._trained} at {found}"
            self.lossy += 1

    def warn(self, source: str) -> None:
        """Say once whether training text was lost: no figure is wrong for it, but the model never sees it."""
        if self.lossy:
            _log.warning(
                "%s: the tokenizer changes %d of %d training documents (%s); the model learns the changed text",
                source,
                self.lossy,
                self._trained,
                self._first,
            )


def refuse_lossy(manifest: dict, directory) -> None:
    """Refuse a folder that was prepared by a version that let held-out text be lost.

    Raises:
        ValueError: its manifest counts held-out documents that the tokenizer changed.
    """
    if lost := manifest["tokenizer"].get("lossy_validation_documents", 0):
        raise ValueError(
            f"{directory}: its tokenizer changes the text of {lost} held-out documents; bits per byte would be wrong; "
            f"{REMEDY}"
        )
