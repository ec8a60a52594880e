"""Tokens to text as they come."""

import codecs

_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most tokens that a character can be spread over
_REPLACEMENT = "\ufffd".encode()


class TextStream:
    """Turns generated tokens into pieces of valid text that join to the text of all of them.

    A token's text can depend on the one before it (SentencePiece drops the space of the first word), so it is what the
    token adds to the text of the last piece. Bytes of a character that is not complete yet wait for the rest of it.

    Args:
        tokenizer: decodes ids to bytes.
        context: token ids that the generated ones follow.
    """

    def __init__(self, tokenizer, context: list[int]):
        self._tokenizer = tokenizer
        self._before = context[-_LONGEST_CHARACTER:]
        self._waiting: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""
        self._waiting.append(token)
        added = self._added()
        # Tokenizers with a byte fallback decode a part of a character to U+FFFD, and the whole of it to the character.
        if added.endswith(_REPLACEMENT) and len(self._waiting) < _LONGEST_CHARACTER:
            return ""
        self._before, self._waiting = self._waiting, []
        return self._decoder.decode(added)

    def finish(self) -> str:
        """What was still waiting, U+FFFD for what never became a character."""
        added = self._added() if self._waiting else b""
        self._waiting = []
        return self._decoder.decode(added, final=True)

    def _added(self) -> bytes:
        before = self._tokenizer.decode_bytes(self._before)
        return self._tokenizer.decode_bytes(self._before + self._waiting)[len(before) :]
