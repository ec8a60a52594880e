"""Text of a sequence while it is generated: complete characters, and stop strings across tokens."""

from fusedlm.generation.text import TextStream


class SequenceText:
    """Turns tokens into text that can be released.

    Text that may be the beginning of a stop string is held until the next tokens decide. The text ends before the first
    stop string, wherever the tokens cut it.

    stopped: a stop string was found.
    n_released: characters released so far.
    """

    def __init__(self, tokenizer, context: list[int], stop: tuple[str, ...] = ()):
        """context: ids before the text. stop: strings, none of them empty."""
        self._stream = TextStream(tokenizer, context)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped, self.n_released = False, 0

    @property
    def n_decoded(self) -> int:
        """Characters of all tokens so far, the held ones included: where the next token begins."""
        return self.n_released + len(self._held)

    def add(self, token: int) -> str:
        """The text that this token releases."""
        return self._release(self._stream.add(token), at_end=False)

    def finish(self) -> str:
        """The text that was held, with U+FFFD for an incomplete character."""
        return self._release(self._stream.finish(), at_end=True)

    def _release(self, piece: str, at_end: bool) -> str:
        if not self._stop:
            self.n_released += len(piece)
            return piece
        if self.stopped:
            return ""
        text, self._held = self._held + piece, ""
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif not at_end:
            n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - n_held], text[len(text) - n_held :]
        self.n_released += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` with which the text ends."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def token_text(tokenizer, token: int) -> str:
    """A token for people: its text, or of bytes that are no text `bytes:\\xc3`, as other servers write it."""
    if token == tokenizer.eot_id:
        return getattr(tokenizer, "end_of_text", "<|endoftext|>")
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
