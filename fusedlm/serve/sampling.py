"""The next tokens of a batch whose sequences have different settings and random numbers of their own."""

from collections.abc import Sequence as Rows

import torch

from fusedlm.generation.sampling import draw
from fusedlm.serve.requests import Choosing, ScoredToken, Sequence

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks


def next_tokens(logits_BV: torch.Tensor, sequences: Rows[Sequence]) -> tuple[list[int], list[ScoredToken | None]]:
    """One token for each sequence, -1 where the logits are not finite; and the token with its log-probability, None
    where that was not requested. Everything is queued on the device before it is waited for, once.

    A token depends on the row's logits, on its settings and on the next number of its generator, not on the rest of the
    batch: rows of equal settings are drawn together, row by row.
    """
    tokens_B = _drawn(_changed(logits_BV, sequences), sequences)
    rows = [row for row, sequence in enumerate(sequences) if sequence.choosing.logprobs is not None]
    if not rows:
        return tokens_B.tolist(), [None] * len(sequences)
    n_top = [sequences[row].choosing.logprobs for row in rows]
    wanted_BV, wanted_B = logits_BV, tokens_B
    if len(rows) < len(sequences):
        index = _on_device(rows, torch.int64, logits_BV.device)
        wanted_BV, wanted_B = logits_BV[index], tokens_B[index]
    own_B, top = _logprobs(wanted_BV, wanted_B.clamp(min=0), max(n_top))
    values = torch.cat([tokens_B.double(), own_B]).tolist()  # float64 has all ids
    tokens, own = [int(token) for token in values[: len(sequences)]], values[len(sequences) :]
    found: list[ScoredToken | None] = [None] * len(sequences)
    for row, logprob, pairs, n in zip(rows, own, _pairs(top, len(rows)), n_top, strict=True):
        found[row] = ScoredToken(max(0, tokens[row]), 0, logprob, pairs[:n])
    return tokens, found


def _drawn(logits_BV: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    groups: dict = {}
    for row, sequence in enumerate(sequences):
        groups.setdefault(sequence.choosing.sampling, []).append(row)
    if len(groups) == 1:
        return _draw(logits_BV, sequences, next(iter(groups)))
    tokens_B = torch.empty(len(sequences), dtype=torch.int64, device=logits_BV.device)
    for sampling, rows in groups.items():
        index = _on_device(rows, torch.int64, logits_BV.device)
        tokens_B[index] = _draw(logits_BV[index], [sequences[row] for row in rows], sampling)
    return tokens_B


def _draw(logits_BV, sequences, sampling) -> torch.Tensor:
    uniform_B = None
    if sampling.temperature > 0:
        uniform_B = _on_device([sequence.next_uniform() for sequence in sequences], torch.float64, logits_BV.device)
    return draw(logits_BV, uniform_B, sampling)


def _on_device(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copied without waiting for the device, as from memory that is not pinned it would be."""
    found = torch.tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def _changed(logits_BV: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Logits with penalties and biases, in one scatter."""
    rows, ids, changes = [], [], []
    for row, sequence in enumerate(sequences):
        if sequence.choosing.changes_logits:
            for token, change in _changes(sequence.choosing, sequence.counts).items():
                rows.append(row)
                ids.append(token)
                changes.append(change)
    if not rows:
        return logits_BV
    device = logits_BV.device
    index = _on_device(rows, torch.int64, device), _on_device(ids, torch.int64, device)
    change = _on_device(changes, logits_BV.dtype, device)
    return logits_BV.index_put(index, logits_BV[index] + change)


def _changes(choosing: Choosing, counts: dict[int, int]) -> dict[int, float]:
    changes = dict(choosing.logit_bias)
    if choosing.presence_penalty or choosing.frequency_penalty:
        for token, n in counts.items():
            penalty = choosing.presence_penalty + n * choosing.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    return changes


def scores(logits_TV: torch.Tensor, tokens: list[int], n_top: int) -> list[ScoredToken]:
    """Tokens with their log-probabilities and the n_top most likely ids, from the logits before each."""
    own_T, top = _logprobs(logits_TV, _on_device(tokens, torch.int64, logits_TV.device), n_top)
    pairs = _pairs(top, len(tokens))
    return [ScoredToken(token, 0, own, top) for token, own, top in zip(tokens, own_T.tolist(), pairs, strict=True)]


def _logprobs(logits_TV: torch.Tensor, tokens_T: torch.Tensor, n_top: int) -> tuple[torch.Tensor, tuple | None]:
    """(T,) of the tokens, and the values and indices (T, n_top) of the most likely ones, most likely first, or None;
    float64, on the device."""
    logprobs_TV = logits_TV.double().log_softmax(-1)
    own_T = logprobs_TV.gather(1, tokens_T[:, None])[:, 0].clamp(min=LOWEST_LOGPROB)
    return own_T, logprobs_TV.topk(min(n_top, logits_TV.shape[1])) if n_top else None


def _pairs(top: tuple | None, n: int) -> list[tuple[tuple[int, float], ...]]:
    """Of each of n tokens the most likely ids with their log-probabilities."""
    if top is None:
        return [()] * n
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [tuple((i, p) for i, p in zip(*row, strict=True) if p > LOWEST_LOGPROB) for row in rows]
