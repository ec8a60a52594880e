"""Any text as documents for scoring."""

import numpy as np


def text_documents(text: str, tokenizer) -> list[tuple[np.ndarray, int]]:
    """The full text as one document, as `score_documents` takes it.

    Returns:
        `[(tokens, n_bytes)]`: tokens (1 + n,) int64, end-of-text first; n_bytes is the UTF-8 length of the text.

    Raises:
        ValueError: the text is empty, holds lone surrogates, or does not survive tokenization byte for byte: the bytes
            counted would not be those of the text that was scored.
    """
    if not text:
        raise ValueError("the text is empty; there is nothing to score")
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from None
    ids = tokenizer.encode(text)
    if found := tokenizer.change(ids, text):
        raise ValueError(
            f"the tokenizer changes this text at {found}; bits per byte need a tokenizer that keeps every byte"
        )
    return [(np.array([tokenizer.eot_id, *ids], dtype=np.int64), len(raw))]
