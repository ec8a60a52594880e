"""What a model says of each token of a text by sliding windows: nats, entropy, and the probability of a hint."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusedlm.evaluate.score import check_finite
from fusedlm.evaluate.windows import IGNORED, Window, batches, document_windows, join_documents, pad_rows
from fusedlm.model.precision import autocast

_LOGITS = 2**22  # most at a time in float64


@dataclass(frozen=True)
class Sequences:
    """The sequences that windows slide over: the documents, or all of them joined.

    numbers: of the documents, from 0, or None of all of them. tokens: (1 + n,) of each. targets: (n,) of each, -100
    where nothing is scored.
    """

    numbers: list[int | None]
    tokens: list[np.ndarray]
    targets: list[np.ndarray]

    @staticmethod
    def of(documents: Sequence[np.ndarray], across_documents: bool) -> "Sequences":
        if across_documents:
            tokens, targets = join_documents(documents)
            return Sequences([None], [tokens], [targets])
        tokens = [np.asarray(one, dtype=np.int64) for one in documents]
        return Sequences(list(range(len(tokens))), tokens, [one[1:] for one in tokens])

    def windows(self, window: int, stride: int) -> Iterator[Window]:
        """Windows in the order of the text."""
        for number, tokens, targets in zip(self.numbers, self.tokens, self.targets, strict=True):
            yield from document_windows(number, tokens, window, stride, targets)

    def starts(self) -> dict[int | None, int]:
        """The place of the first prediction of each sequence among all, by its number."""
        return dict(zip(self.numbers, np.cumsum([0, *map(len, self.targets)]).tolist(), strict=False))

    def scored(self) -> np.ndarray:
        """Which of all predictions are scored: bool."""
        return np.concatenate([np.zeros(0, dtype=bool), *(targets != IGNORED for targets in self.targets)])


@dataclass(frozen=True)
class Predictions:
    """Of each scored token, (n,) float64 in the order of the text."""

    nll: np.ndarray  # nats
    entropy: np.ndarray  # nats, of the distribution that the token was drawn from
    log_hint: np.ndarray | None  # log probability of its hint, under the same distribution
    metrics: dict[str, torch.Tensor]  # of layers, summed


@torch.no_grad()
def predict(
    model,
    sequences: Sequences,
    hints: np.ndarray | None,
    *,
    window: int,
    stride: int,
    batch_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> Predictions:
    """Score every window. The model should be in eval mode.

    Args:
        hints: (n,) int64 token of each scored token, -1 for none; None: none at all.

    Raises:
        NotFinite: the likelihood is not finite.
    """
    scored = sequences.scored()
    found = np.zeros((2 if hints is None else 3, len(scored)))
    if hints is not None:
        spread = np.full(len(scored), -1, dtype=np.int64)
        spread[scored] = hints
    starts = sequences.starts()
    metrics: dict[str, torch.Tensor] = {}
    done = 0
    for rows, width in batches(sequences.windows(window, stride), window, batch_tokens):
        ids, targets = pad_rows(rows, width)
        select, counts = np.flatnonzero(targets != IGNORED), (targets != IGNORED).sum(1)
        if not len(select):
            continue
        asked = [targets.reshape(-1)[select]]
        where = np.concatenate([np.arange(row.n_scored) + starts[row.document] + row.first for row in rows])
        where = where[scored[where]]
        if hints is not None:
            asked.append(np.maximum(spread[where], 0))
        ids, select, asked = (torch.from_numpy(x).to(device) for x in (ids, select, np.stack(asked, 1)))
        with autocast(device, dtype):
            output = model(ids, select=select)
        for name, value in output.metrics.items():
            metrics[name] = value if name not in metrics else metrics[name] + value
        found[:, where] = _statistics(output.logits, asked).cpu().numpy()
        for row, part in zip(rows, np.split(found[0, where], np.cumsum(counts)[:-1]), strict=True):
            check_finite(part.sum(), row.document)
        done += len(where)
        if progress is not None:
            progress(done)
    nll, entropy, *log_hint = (values[scored] for values in found)
    return Predictions(nll, entropy, log_hint[0] if log_hint else None, metrics)


def _statistics(logits: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """(1 + asked, n) float64: nats of the first token requested, entropy, log probability of the others.

    Args:
        logits: (n, V).
        asked: (n, number of tokens) int64.
    """
    size = max(1, _LOGITS // logits.shape[1])
    parts = []
    for some, tokens in zip(logits.split(size), asked.split(size), strict=True):
        log_p = some.double().log_softmax(1)
        entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(1)
        of_token = log_p.gather(1, tokens)
        parts.append(torch.stack([-of_token[:, 0], entropy, *of_token[:, 1:].unbind(1)]))
    return torch.cat(parts, 1)
