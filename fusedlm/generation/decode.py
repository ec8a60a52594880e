"""Token-by-token decoding of a batch with the model's state."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusedlm.generation.sampling import next_token_probabilities, sample
from fusedlm.generation.text import TextStream
from fusedlm.model.precision import autocast

_RESERVED_TOKENS = 2**16  # a longer state grows as tokens come: max_tokens=1000000000 is rarely meant to be reached


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: see `next_token_probabilities`."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


@dataclass
class Row:
    """One sequence of a batch.

    index: of its prompt.
    ids: end-of-text and the prompt.
    generator: of its random numbers.
    """

    index: int
    ids: list[int]
    generator: torch.Generator


def decode(
    model, tokenizer, rows: list[Row], sampling: Sampling, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[int, str]]:
    """Continue rows of any lengths together: one prefill, then one token of each per step, until all have ended. Ids
    that the tokenizer has no token for are never drawn.

    Yields:
        (index of the prompt, non-empty piece of its text); the pieces of one prompt in order.

    Raises:
        ValueError: the model's logits are not finite.
    """
    texts = [TextStream(tokenizer, row.ids) for row in rows]
    was_training = model.training
    model.eval()
    try:
        # The last token is not fed back, hence the -1.
        reserved = max(len(row.ids) for row in rows) + sampling.max_tokens - 1
        fits = reserved * len(rows) <= _RESERVED_TOKENS
        state = model.init_state(len(rows), max_tokens=reserved if fits else None)
        unused = torch.from_numpy(tokenizer.unused_ids(model.vocab_size)).to(device)
        new = {i: row.ids for i, row in enumerate(rows)}  # of the rows that have not ended
        for _ in range(sampling.max_tokens):
            logits = _last_logits(model, new, state, device, dtype).index_fill(1, unused, -torch.inf)
            active, new = list(new), {}
            for i, of_row in zip(active, logits, strict=True):
                token = _choose(of_row, sampling, rows[i].generator)
                if token != tokenizer.eot_id:
                    new[i] = [token]
                piece = texts[i].add(token) if i in new else texts[i].finish()
                if piece:
                    yield rows[i].index, piece
            if not new:
                return
        for i in new:
            if piece := texts[i].finish():
                yield rows[i].index, piece
    finally:
        model.train(was_training)


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    probabilities = next_token_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return sample(probabilities, generator)


# Not in the generator: disabled gradients and autocast would stay on for the caller between two pieces.
@torch.no_grad()
def _last_logits(model, new: dict[int, list[int]], state, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(len(new), vocab) float32 logits after the new ids of each row; all ids are appended to the state, whose other
    rows stay as they are."""
    width = max(map(len, new.values()))
    lengths = [len(new.get(row, ())) for row in range(len(state.lengths))]
    tokens = [[*new.get(row, ()), *[0] * (width - n)] for row, n in enumerate(lengths)]
    last = [row * width + len(ids) - 1 for row, ids in new.items()]
    # Without padding the state need not keep a length per row.
    padding = {"lengths": lengths} if min(lengths) < width else {}
    with autocast(device, dtype):
        output = model(
            torch.tensor(tokens, device=device), state=state, select=torch.tensor(last, device=device), **padding
        )
    return output.logits.float()
