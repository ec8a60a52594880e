"""The beginning of documents, up to a number of tokens."""

from collections.abc import Iterable, Iterator

import numpy as np

_LOOK_AHEAD = 8  # tokens after a cut that the decoding of the last character before it may depend on
_STEPS_BACK = 16  # most tokens of one character, and some


def first_tokens(
    documents: Iterable[tuple[np.ndarray, int]], max_tokens: int | None, tokenizer
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields documents in order, of which together at most `max_tokens` text tokens; None: all.

    The last one is cut, with the bytes of exactly the tokens that are left. It is cut between two characters, so a
    tokenizer that decodes characters, not bytes, may leave a few tokens fewer.

    Args:
        documents: pairs of tokens (1 + n,) of integers, end-of-text first, and the bytes of the document's text.
        tokenizer: `decode_bytes` gives the bytes of ids. It must keep the text.

    Raises:
        ValueError: the number is less than 1, or not even the first character fits.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1, or None for all")
    left = max_tokens
    for tokens, n_bytes in documents:
        if left is None or len(tokens) - 1 <= left:
            yield tokens, n_bytes
            if left is not None:
                left -= len(tokens) - 1
                if left == 0:
                    return
            continue
        n, n_bytes = _cut(np.asarray(tokens[1:]), left, tokenizer)
        if n:
            yield tokens[: 1 + n], n_bytes
        elif left == max_tokens:
            raise ValueError(f"max_tokens={max_tokens}: the first character of the text has more tokens; raise it")
        return


def _cut(text: np.ndarray, most: int, tokenizer) -> tuple[int, int]:
    """The largest number of tokens up to `most` whose bytes begin the text, and the number of those bytes."""
    known = tokenizer.decode_bytes(text[: most + _LOOK_AHEAD].tolist())
    for n in range(most, max(0, most - _STEPS_BACK), -1):
        decoded = tokenizer.decode_bytes(text[:n].tolist())
        if decoded and known.startswith(decoded):
            return n, len(decoded)
    return 0, 0
