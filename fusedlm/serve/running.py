"""One running sequence: its tokens become pieces of text, until it ends."""

from fusedlm.model.rows import Snapshot
from fusedlm.serve.requests import Piece, ScoredToken, Sequence


class RunningSequence:
    """snapshot: of its state at the last boundary of blocks, with the length there; None: there was none."""

    def __init__(self, sequence: Sequence, tokenizer):
        self.sequence = sequence
        self._eot_id = tokenizer.eot_id
        self._held: list[ScoredToken] = []  # whose text is not released
        self.snapshot: tuple[int, Snapshot] | None = None

    def accept(self, token: int, scored: ScoredToken | None) -> Piece:
        """Take the next token; scored: with its log-probability, None if that was not requested."""
        sequence, text = self.sequence, self.sequence.text
        if token == self._eot_id and not sequence.ignore_eot:
            return self._piece(text.finish(), "stop")
        if scored is not None:
            self._held.append(ScoredToken(scored.id, text.n_decoded, scored.logprob, scored.top))
        sequence.count(token)
        piece = text.add(token)
        if text.stopped:
            return self._piece(piece, "stop")
        if len(sequence.generated) < sequence.max_tokens:
            return self._piece(piece, None)
        piece += text.finish()
        return self._piece(piece, "stop" if text.stopped else "length")

    def _piece(self, text: str, finish: str | None) -> Piece:
        if finish and not self.sequence.text.stopped:
            tokens, self._held = self._held, []
            return Piece(text, tuple(tokens), finish)
        n_released = self.sequence.text.n_released
        n = len(self._held)
        while n and self._held[n - 1].start >= n_released:  # starts ascend
            n -= 1
        tokens, self._held = self._held[:n], self._held[n:]
        return Piece(text, tuple(tokens), finish)
