"""The next tokens of a batch whose sequences have different settings and random numbers of their own."""

from collections.abc import Sequence as Rows
from dataclasses import replace

import torch

from fusedlm.generation.sampling import draw
from fusedlm.serve.requests import Choosing, ScoredToken, Sequence

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks


def choose(logits_BV: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """One token for each sequence, -1 where the logits are not finite.

    A token depends on the row's logits, on its settings and on the next number of its generator, not on the rest of the
    batch: rows of equal settings are drawn together, row by row.
    """
    logits_BV = _changed(logits_BV, sequences)
    groups: dict = {}
    for row, sequence in enumerate(sequences):
        groups.setdefault(sequence.choosing.sampling, []).append(row)
    if len(groups) == 1:
        return _draw(logits_BV, sequences, next(iter(groups))).tolist()
    tokens_B = torch.empty(len(sequences), dtype=torch.int64, device=logits_BV.device)
    for sampling, rows in groups.items():
        index = torch.tensor(rows, device=logits_BV.device)
        tokens_B[index] = _draw(logits_BV[index], [sequences[row] for row in rows], sampling)
    return tokens_B.tolist()


def _draw(logits_BV, sequences, sampling) -> torch.Tensor:
    uniform_B = None
    if sampling.temperature > 0:
        uniform = [sequence.next_uniform() for sequence in sequences]
        uniform_B = torch.tensor(uniform, dtype=torch.float64, device=logits_BV.device)
    return draw(logits_BV, uniform_B, sampling)


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
    index = torch.tensor(rows, device=device), torch.tensor(ids, device=device)
    change = torch.tensor(changes, dtype=logits_BV.dtype, device=device)
    return logits_BV.index_put(index, logits_BV[index] + change)


def _changes(choosing: Choosing, counts: dict[int, int]) -> dict[int, float]:
    changes = dict(choosing.logit_bias)
    if choosing.presence_penalty or choosing.frequency_penalty:
        for token, n in counts.items():
            penalty = choosing.presence_penalty + n * choosing.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    return changes


def score_rows(
    logits_BV: torch.Tensor, tokens: list[int], sequences: Rows[Sequence]
) -> list[ScoredToken | None]:
    """The chosen token of each sequence with its log-probability; None where it was not requested."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.choosing.logprobs is not None]
    found: list[ScoredToken | None] = [None] * len(sequences)
    if rows:
        n_top = [sequences[row].choosing.logprobs for row in rows]
        index = torch.tensor(rows, device=logits_BV.device)
        scored = scores(logits_BV[index], [max(0, tokens[row]) for row in rows], max(n_top))
        for row, token, n in zip(rows, scored, n_top, strict=True):
            found[row] = token if len(token.top) <= n else replace(token, top=token.top[:n])
    return found


def scores(logits_TV: torch.Tensor, tokens: list[int], n_top: int) -> list[ScoredToken]:
    """Tokens with their log-probabilities and the n_top most likely ids, from the logits before each; in float64."""
    logprobs_TV = logits_TV.double().log_softmax(-1)
    index_T = torch.tensor(tokens, device=logits_TV.device)
    own_T = logprobs_TV.gather(1, index_T[:, None])[:, 0].clamp(min=LOWEST_LOGPROB).tolist()
    tops: list = [()] * len(tokens)
    if n_top:
        top = logprobs_TV.topk(min(n_top, logits_TV.shape[1]))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        tops = [tuple((i, p) for i, p in zip(*pair, strict=True) if p > LOWEST_LOGPROB) for pair in pairs]
    return [ScoredToken(token, 0, own, top) for token, own, top in zip(tokens, own_T, tops, strict=True)]
