"""Negative log-likelihood and bits per byte of whole documents or of sliding windows over them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from fusedlm.evaluate.windows import batches, document_windows
from fusedlm.model.auxiliary import Routing, RoutingTally
from fusedlm.model.precision import autocast

_CHUNK = 2048  # most tokens that enter the state at once
_SCORES = 2**22  # most pairs of a new token and an earlier one at once: attention masks or scores them, for every head
_LOGITS = 2**25  # most logits that exist at once: 128 MiB in float32


@dataclass(frozen=True)
class Score:
    nll: float  # nats, over all scored tokens
    tokens: int  # scored tokens: every text token once; end-of-text is never scored
    bytes: int  # bytes of the scored text
    documents: int
    routing: Routing | None = None  # levels of the scored tokens; None: the model has no routed feed-forward

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nll / math.log(2) / self.bytes

    @property
    def nll_per_token(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens


def score_documents(
    model,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    window: int | None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score documents, each token exactly once; sums in float64.

    The model is put into eval mode and back. The result does not depend on how windows are batched, except for the
    rounding of the model's own arithmetic.

    Args:
        model: a decoder on `device`.
        documents: pairs of tokens (1 + n,) of integers, end-of-text first, and the bytes of the document's text.
        window: None: each document goes whole through the model's state, one at a time and in chunks, so that memory
            does not grow with the length of the logits. Else the most tokens the model sees at once: window i reads
            tokens [i * stride, i * stride + window) of a document and scores those that were not scored before.
        stride: tokens between the starts of two windows; None: half a window.
        batch_tokens: tokens of a batch of windows, padding included (at least one window). None: 65536 on CUDA devices,
            4096 elsewhere, where larger ones spend their time on fresh memory.
        max_tokens: documents are taken, in order and whole, until they hold this many text tokens; None: all.
        device, dtype: where the model is, and the precision of autocast.
        progress: called with the number of tokens scored so far.

    Raises:
        ValueError: a value is out of range, there is no text to score, or the likelihood is not finite.
    """
    device = torch.device(device)
    if batch_tokens is None:
        batch_tokens = 65536 if device.type == "cuda" else 4096
    stride = _check(window, stride, batch_tokens, max_tokens)
    taken = _Taken(documents, max_tokens, model.vocab_size)
    sums, scored, tally = [], 0, RoutingTally(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if window is None:
                pieces = _score_whole(model, taken, device, dtype, tally)
            else:
                pieces = _score_windows(model, taken, window, stride, batch_tokens, device, dtype, tally)
            for nll, n_tokens in pieces:
                sums.append(nll)
                scored += n_tokens
                if progress is not None:
                    progress(scored)
    finally:
        model.train(was_training)
    if scored == 0:
        raise ValueError(f"no text to score: {taken.documents} documents hold no text token")
    if taken.bytes <= 0:
        raise ValueError(f"{scored} tokens were scored, but the documents count {taken.bytes} bytes")
    return Score(
        nll=math.fsum(sums),
        tokens=scored,
        bytes=taken.bytes,
        documents=taken.documents,
        routing=tally.result(tally.counts.flatten().tolist()) if tally else None,
    )


def _check(window: int | None, stride: int | None, batch_tokens: int, max_tokens: int | None) -> int | None:
    """The stride to use."""
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1, or None for all")
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride} needs a window; without one, documents are scored whole")
        return None
    if window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for whole documents")
    if stride is None:
        return max(1, window // 2)
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}, so that no token is left out")
    return stride


class _Taken:
    """Documents in order until the budget is met, counted as they pass."""

    def __init__(self, documents: Iterable[tuple[np.ndarray, int]], max_tokens: int | None, vocab_size: int):
        self._source, self._max_tokens, self._vocab_size = documents, max_tokens, vocab_size
        self.tokens = self.bytes = self.documents = 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for tokens, n_bytes in self._source:
            tokens = np.asarray(tokens)
            if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
                raise ValueError(
                    f"document {self.documents}: got {tokens.dtype} of shape {tokens.shape}; "
                    "expected a line of token ids that starts with end-of-text"
                )
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._vocab_size:
                raise ValueError(
                    f"document {self.documents}: token id {low if low < 0 else high} is not one of the model's "
                    f"{self._vocab_size}; the text was prepared with another tokenizer"
                )
            self.documents += 1
            self.tokens += len(tokens) - 1
            self.bytes += int(n_bytes)
            yield self.documents - 1, tokens
            if self._max_tokens is not None and self.tokens >= self._max_tokens:
                return


def stream_nll(model, tokens: np.ndarray, *, device: torch.device | str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Score sequences of equal length through the model's state, in chunks, so that memory does not grow with the
    length of the logits. The model should be in eval mode; no gradients are kept.

    Args:
        tokens: (B, 1 + n) of integers, the first of each context and not scored.
        device, dtype: where the model is, and the precision of autocast.

    Returns:
        An iterator of (B, c) float64 on the CPU, nats of the next c tokens, until all n are scored.
    """
    n = tokens.shape[1] - 1
    if n == 0:
        return
    device = torch.device(device)
    batch = tokens.shape[0]
    state = model.init_state(batch, max_tokens=n)
    stop = 0
    while stop < n:
        start, stop = stop, min(n, stop + max(16, min(_CHUNK, _SCORES // max(stop, 1)) // batch))
        ids = torch.from_numpy(tokens[:, start : stop + 1].astype(np.int64)).to(device)
        with torch.no_grad():
            with autocast(device, dtype):
                hidden = model.hidden(ids[:, :-1], state=state)
            nll = _nll(model, hidden.flatten(0, 1), ids[:, 1:].flatten(), device, dtype)
        yield nll.view(batch, stop - start)


def _score_whole(model, documents, device, dtype, tally) -> Iterator[tuple[float, int]]:
    """(nats, tokens) of each chunk of each document."""
    for number, tokens in documents:
        for chunk in stream_nll(model, tokens[None], device=device, dtype=dtype):
            tally.add()
            nll = math.fsum(chunk[0].tolist())
            _check_finite(nll, number)
            yield nll, chunk.shape[1]


def _score_windows(model, documents, window, stride, batch_tokens, device, dtype, tally) -> Iterator[tuple[float, int]]:
    """(nats, tokens) of each batch."""
    windows = (w for number, tokens in documents for w in document_windows(number, tokens, window, stride))
    for rows, width in batches(windows, window, batch_tokens):
        ids = np.zeros((len(rows), width), dtype=np.int64)
        # Context and padding have target -100, so the head runs on the predictions that count and on no other.
        targets = np.full((len(rows), width), -100, dtype=np.int64)
        for r, row in enumerate(rows):
            n = len(row.inputs)
            ids[r, :n] = row.inputs
            targets[r, n - row.n_scored : n] = row.targets[n - row.n_scored :]
        scored = torch.from_numpy(np.flatnonzero(targets != -100))
        with autocast(device, dtype):
            hidden = model.hidden(torch.from_numpy(ids).to(device))
        scored = scored.to(device)
        tally.add(scored)
        hidden = hidden.flatten(0, 1)[scored]
        targets = torch.from_numpy(targets).to(device).flatten()[scored]
        nll = _nll(model, hidden, targets, device, dtype)
        for row, part in zip(rows, nll.split([row.n_scored for row in rows]), strict=True):
            _check_finite(part.sum().item(), row.document)
        yield math.fsum(nll.tolist()), len(nll)


def _nll(model, hidden: torch.Tensor, targets: torch.Tensor, device, dtype) -> torch.Tensor:
    """hidden (n, dim), targets (n,) -> (n,) float64 on the CPU; the softmax is in float32."""
    parts = []
    size = max(1, _LOGITS // model.vocab_size)
    for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        with autocast(device, dtype):
            logits = model.head.logits(rows[None])[0]
        parts.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
    return torch.cat(parts).double().cpu()


def _check_finite(nll: float, document: int) -> None:
    if not math.isfinite(nll):
        raise ValueError(
            f"document {document}: the likelihood is not finite ({nll}); the weights are damaged or diverged, "
            "or the precision overflows (try float32)"
        )
