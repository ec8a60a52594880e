"""Small models, an engine that is stepped by hand, and what it gave."""

from dataclasses import dataclass, field

import torch

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.serve import Choosing, Engine, Limits, Sequence
from fusedlm.testing import part_model, randomise_

TOKENIZER = ByteTokenizer()
GREEDY = Choosing(temperature=0.0)
HYBRID = "{type: gdn, n_heads: 2, chunk_size: 8}"


def make_model(mixer: str = HYBRID, ffn: str = "{type: swiglu, hidden: 48}", scale: float = 0.3):
    model = part_model(mixer, ffn, vocab_size=TOKENIZER.vocab_size, extra="tie_embeddings: false")
    return randomise_(model, scale=scale).eval()


def make_engine(model, device: str = "cpu", **limits) -> Engine:
    limits = {"context": 256, "sequences": 4, "chunk": 16, "block_size": 8} | limits
    device = torch.device(device)
    return Engine(model.to(device), TOKENIZER, Limits(**limits), device=device, dtype=torch.float32)


def small_engine(device: str = "cpu", **limits) -> Engine:
    """With the weights of `make_model`, in whatever process: with one thread there too, since sums depend on it."""
    torch.set_num_threads(1)
    return make_engine(make_model(), device, **limits)


def make_sequence(text: str | list[int], choosing: Choosing = GREEDY, max_tokens: int = 12, **options) -> Sequence:
    ids = [TOKENIZER.eot_id, *TOKENIZER.encode(text)] if isinstance(text, str) else text
    return Sequence(TOKENIZER, ids, choosing, max_tokens=max_tokens, **options)


@dataclass
class Result:
    text: str = ""
    tokens: list = field(default_factory=list)
    finish: str | None = None
    pieces: list = field(default_factory=list)


def collect(results: dict, pieces) -> None:
    for sequence, piece in pieces:
        result = results.setdefault(sequence.number, Result())
        assert result.finish is None, "a piece after the last one"
        result.text += piece.text
        result.tokens += piece.tokens
        result.finish = piece.finish
        result.pieces.append(piece)


def run(engine: Engine, sequences: list[Sequence]) -> list[Result]:
    """All sequences, to their ends."""
    engine.submit(sequences)
    results: dict = {}
    while not engine.is_idle:
        collect(results, engine.step())
    return [results[sequence.number] for sequence in sequences]


def assert_nothing_is_left(engine: Engine) -> None:
    """No slot, state, waiting or running sequence."""
    assert engine.is_idle and len(engine.slots) == 0 and engine.slots.state is None
    assert engine.sequences() == [] and engine.slots.nbytes() == 0
