"""Streaming from tokens to text."""

import codecs

_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most tokens per character
_REPLACEMENT = "\ufffd".encode()


class TextStream:
    """Turns generated tokens into pieces of valid Unicode whose concatenation is the text of all tokens.

    A token's text can depend on the token before it (SentencePiece drops the space of the first word), so a piece is
    what the tokens add to the decoded text. Bytes of an incomplete character are held back.

    Args:
        tokenizer: decodes ids to bytes.
        context: token ids before the generated ones.
    """

    def __init__(self, tokenizer, context: list[int]):
        self._tokenizer = tokenizer
        self._before = context[-_LONGEST_CHARACTER:]
        self._held: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._held.append(token)
        added = self._added()
        # Tokenizers with byte fallback decode an incomplete character to U+FFFD.
        if added.endswith(_REPLACEMENT) and len(self._held) < _LONGEST_CHARACTER:
            return ""
        self._before, self._held = self._held, []
        return self._decoder.decode(added)

    def finish(self) -> str:
        """The text held back, with U+FFFD for an incomplete character."""
        added = self._added() if self._held else b""
        self._held = []
        return self._decoder.decode(added, final=True)

    def _added(self) -> bytes:
        before = self._tokenizer.decode_bytes(self._before)
        return self._tokenizer.decode_bytes(self._before + self._held)[len(before) :]
