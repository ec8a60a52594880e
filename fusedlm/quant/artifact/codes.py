"""Entropy coding of all integer matrices of an artifact, one after the other, with the models that learn from each."""

import numpy as np

from fusedlm.quant.artifact.code_model import LARGEST_RANK, CodeModel, Layout
from fusedlm.quant.artifact.rans import PRECISION, Decoder, Encoder
from fusedlm.quant.artifact.tables import Tables

_LEAST_LANES, _MOST_LANES, _ELEMENTS_PER_LANE = 16, 1024, 8192  # a lane costs about three bytes


class _Cost:
    """A channel that counts the bits of its symbols."""

    def __init__(self):
        self.bits = 0.0

    def code(self, contexts: np.ndarray, tables: Tables, symbols: np.ndarray) -> np.ndarray:
        frequencies, _ = tables.lookup(contexts, symbols)
        self.bits += float((PRECISION - np.log2(frequencies)).sum())
        return symbols


class _Writing:
    def __init__(self, encoder: Encoder):
        self._encoder = encoder

    def code(self, contexts: np.ndarray, tables: Tables, symbols: np.ndarray) -> np.ndarray:
        self._encoder.put(*tables.lookup(contexts, symbols))
        return symbols


class _Reading:
    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def code(self, contexts: np.ndarray, tables: Tables, symbols: None) -> np.ndarray:
        return self._decoder.get(contexts, tables)


class CodesWriter:
    """Encodes matrices in order.

    Args:
        n_elements: of all matrices together.
    """

    def __init__(self, n_elements: int):
        wanted = n_elements // _ELEMENTS_PER_LANE
        self.lanes = min(max(1 << wanted.bit_length() >> 1, _LEAST_LANES), _MOST_LANES)
        self._encoder = Encoder(self.lanes)
        self._models: dict[int, CodeModel] = {}

    def estimate(self, codes: np.ndarray, bits: int) -> tuple[float, dict]:
        """(bytes of a matrix (rows, columns) as the next one, arguments of `CodeModel.encode` with which it has them).

        Tries both orientations, then more ranks as long as they help.
        """
        codes = codes.astype(np.int64)
        model = self._models.setdefault(bits, CodeModel(bits))

        def cost(**options) -> float:
            channel = _Cost()
            model.copy().encode(channel, codes, **options)
            return channel.bits / 8

        best = min(((cost(transposed=t, rank=0), {"transposed": t, "rank": 0}) for t in (False, True)), key=_first)
        for rank in range(1, LARGEST_RANK + 1):
            options = best[1] | {"rank": rank}
            found = cost(**options)
            if found >= best[0]:
                break
            best = found, options
        return best

    def add(self, codes: np.ndarray, bits: int, options: dict) -> Layout:
        """Encode a matrix as `estimate` says."""
        codes, model = codes.astype(np.int64), self._models.setdefault(bits, CodeModel(bits))
        self._encoder.start_segment()
        return model.encode(_Writing(self._encoder), codes, **options)

    def finish(self) -> tuple[bytes, list[bytes]]:
        """(states of the decoder, words of each matrix)."""
        return self._encoder.finish()


def _first(pair: tuple) -> float:
    return pair[0]


class CodesReader:
    """Decodes matrices in the order in which they were added.

    Raises:
        ValueError: the states are damaged.
    """

    def __init__(self, states: bytes, lanes: int):
        self._decoder = Decoder(states, lanes)
        self._models: dict[int, CodeModel] = {}

    def read(self, words: bytes, bits: int, shape: tuple[int, int], layout: Layout) -> np.ndarray:
        """The codes of the next matrix, int8. Raises ValueError if its words are too few or too many."""
        self._decoder.start_segment(words)
        codes = self._models.setdefault(bits, CodeModel(bits)).decode(_Reading(self._decoder), shape, layout)
        self._decoder.end_segment()
        return codes

    def finish(self) -> None:
        """Raises ValueError if something was decoded wrongly."""
        self._decoder.finish()
