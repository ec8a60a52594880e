"""Interleaved range asymmetric numeral systems (rANS; Duda, arXiv 1311.2540), vectorised over lanes.

A step codes up to `lanes` symbols at once, one in each lane's state; the lanes share one stream of 16-bit words. Words
of consecutive steps are contiguous, so that a stream can be cut into segments, while the states run through all of them
and are paid for once. Everything is integer arithmetic in int64: the same on every platform.
"""

import numpy as np

PRECISION = 16  # bits of a probability: frequencies of a table sum to 2**PRECISION
_LOW = 24  # a state is in [2**_LOW, 2**(_LOW + _WORD))
_WORD = 16
STATE_BYTES = (_LOW + _WORD) // 8


class Encoder:
    """Collects symbols in the order of decoding; `finish` encodes them, last to first."""

    def __init__(self, lanes: int):
        self._lanes = lanes
        self._segments: list[list[tuple[np.ndarray, np.ndarray]]] = []

    def start_segment(self) -> None:
        """The symbols that follow are of a new segment."""
        self._segments.append([])

    def put(self, frequencies: np.ndarray, starts: np.ndarray) -> None:
        """Symbols by the frequency of each, 1 to 2**16 - 1, and the sum of those before it in its table; (n,) int64."""
        self._segments[-1].append((frequencies.astype(np.uint16), starts.astype(np.uint16)))

    def finish(self) -> tuple[bytes, list[bytes]]:
        """(states that decoding starts with, words of each segment)."""
        states = np.full(self._lanes, 1 << _LOW, np.int64)
        segments = [_encode(states, segment, self._lanes) for segment in reversed(self._segments)]
        octets = states.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :STATE_BYTES]
        return octets.tobytes(), segments[::-1]


def _encode(states: np.ndarray, steps: list[tuple[np.ndarray, np.ndarray]], lanes: int) -> bytes:
    words = []
    for frequencies, starts in reversed(steps):
        for first in reversed(range(0, len(frequencies), lanes)):
            f = frequencies[first : first + lanes].astype(np.int64)
            x = states[: len(f)]
            full = x >= f << _LOW
            words.append((x[full] & 0xFFFF).astype("<u2"))
            x = np.where(full, x >> _WORD, x)
            quotient, rest = np.divmod(x, f)
            states[: len(f)] = (quotient << PRECISION) + rest + starts[first : first + lanes]
    return b"".join(part.tobytes() for part in reversed(words))


class Decoder:
    """Gives back what `Encoder` was given.

    Args:
        states: as `finish` returns them.

    Raises:
        ValueError: a state is out of range.
    """

    def __init__(self, states: bytes, lanes: int):
        octets = np.zeros((lanes, 8), np.uint8)
        octets[:, :STATE_BYTES] = np.frombuffer(states, np.uint8).reshape(lanes, STATE_BYTES)
        self._states = octets.view("<u8").astype(np.int64).reshape(-1)
        if (self._states < 1 << _LOW).any():
            raise ValueError("a state of the entropy coder is out of range")
        self._lanes = lanes
        self._words, self._next = np.empty(0, np.int64), 0

    def start_segment(self, words: bytes) -> None:
        """The symbols that follow are of a new segment. Raises ValueError if its length is odd."""
        if len(words) % 2:
            raise ValueError(f"{len(words)} bytes are no 16-bit words")
        self._words, self._next = np.frombuffer(words, "<u2").astype(np.int64), 0

    def get(self, contexts: np.ndarray, tables) -> np.ndarray:
        """The next symbols: contexts (n,) says which of the `Tables` each is coded with.

        Raises:
            ValueError: the segment ends before the last symbol.
        """
        symbols = np.empty(len(contexts), np.int64)
        for first in range(0, len(contexts), self._lanes):
            context = contexts[first : first + self._lanes]
            x = self._states[: len(context)]
            slots = x & ((1 << PRECISION) - 1)
            found, f, starts = tables.find(context, slots)
            symbols[first : first + self._lanes] = found
            x = f * (x >> PRECISION) + slots - starts
            low = np.flatnonzero(x < 1 << _LOW)
            end = self._next + len(low)
            if end > len(self._words):
                raise ValueError("the entropy-coded words end too early")
            x[low] = (x[low] << _WORD) | self._words[self._next : end]
            self._next = end
            self._states[: len(context)] = x
        return symbols

    def end_segment(self) -> None:
        """Raises ValueError if words of the segment are left."""
        if self._next != len(self._words):
            raise ValueError(f"{len(self._words) - self._next} entropy-coded words are left over")

    def finish(self) -> None:
        """Raises ValueError if a state is not the one that encoding began with: something was decoded wrongly."""
        if (self._states != 1 << _LOW).any():
            raise ValueError("the entropy coder does not end in the state that it began with")
