"""Negative log-likelihood and bits per byte of full documents or of sliding windows over them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from fusedlm.distributed import World
from fusedlm.evaluate.windows import IGNORED, batches, document_windows, join_documents, pad_rows
from fusedlm.model.precision import autocast

T = TypeVar("T")

_CHUNK = 2048  # most tokens per call with a state
_SCORES = 2**22  # most pairs of a query and a key per call: attention holds a mask or scores of them, for every head


class NotFinite(ValueError):
    """The likelihood of a document is not finite."""


@dataclass(frozen=True)
class Score:
    nll: float  # nats, over all scored tokens
    tokens: int  # scored tokens: each text token once; end-of-text is never scored
    bytes: int  # bytes of the scored text
    documents: int
    figures: dict = field(default_factory=dict)  # metrics of layers over the scored tokens, as `Decoder.summarise`

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nll / math.log(2) / self.bytes

    @property
    def nll_per_token(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


def score_documents(
    model,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    window: int | None,
    stride: int | None = None,
    across_documents: bool = False,
    batch_tokens: int | None = None,
    longest: int | None = None,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
) -> Score:
    """Score documents, each token exactly once; sums in float64.

    The model is in eval mode meanwhile. How windows are batched changes only the rounding of the model's arithmetic.

    Args:
        model: a decoder on `device`.
        documents: pairs of tokens (1 + n,) of integers, end-of-text first, and the bytes of the document's text.
        window: most tokens the model sees at once: window i reads tokens [i * stride, i * stride + window) of a
            document and scores those that no earlier window has scored. None: the full document, through the model's
            state and in chunks, so that memory for logits is bounded.
            Every window starts from an empty state. A token has at least window - stride tokens of context, where
            its document has them before it.
        stride: tokens from the start of one window to the next; None: `default_stride(window)`.
        across_documents: windows over all documents as one sequence, so that the context of a token is what precedes it
            in the text, across end-of-text. It is held in memory.
        batch_tokens: most tokens per batch of windows, padding included (at least one window). None: 65536 on CUDA
            devices, 4096 elsewhere, where allocating larger batches takes longer than it saves.
        longest: at least the number of text tokens of every document; no window is padded beyond it. None: counted if
            `documents` is a sequence, otherwise unknown.
        device, dtype: device of the model, dtype of autocast.
        progress: called with the number of tokens scored so far, by this process.
        world: the processes that share the batches of windows; all call this with the same documents and get the same
            score. None: this process alone.

    Raises:
        NotFinite: the likelihood is not finite. A ValueError.
        ValueError: a value is out of range, several processes are to score full documents, or there is no text.
    """
    device = torch.device(device)
    batch_tokens = default_batch_tokens(device) if batch_tokens is None else batch_tokens
    stride = check_spans(window, stride, batch_tokens)
    if window is None and across_documents:
        raise ValueError("across_documents=True needs a window; without one, each document is scored in full")
    world = world or World()
    if window is None and world.size > 1:
        raise ValueError(f"{world.size} processes share windows, not full documents; give a window")
    if longest is None and isinstance(documents, Sequence):
        longest = max((np.size(tokens) - 1 for tokens, _ in documents), default=0)
    if window is not None and longest is not None and not across_documents:
        window = min(window, max(1, longest))  # one window reads the full document either way
    source = Documents(documents, model.vocab_size, longest)
    sums, scored = [], 0
    metrics: dict[str, torch.Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if window is None:
                pieces = _score_full(model, source, device, dtype, metrics)
            else:
                sequences = _joined(source) if across_documents else source
                pieces = _score_windows(model, sequences, window, stride, batch_tokens, device, dtype, metrics, world)
            for nll, n_tokens in pieces:
                sums.append(nll)
                scored += n_tokens
                if progress is not None:
                    progress(scored)
    finally:
        model.train(was_training)
    counts = world.sum(torch.tensor([math.fsum(sums), scored], dtype=torch.float64, device=device))
    nll, scored = counts[0].item(), int(counts[1])
    if scored == 0:
        raise ValueError(f"no text to score: {source.documents} documents hold no text token")
    if source.bytes <= 0:
        raise ValueError(f"{scored} tokens were scored, but the documents count {source.bytes} bytes")
    return Score(
        nll=nll,
        tokens=scored,
        bytes=source.bytes,
        documents=source.documents,
        figures=model.summarise({name: world.sum(value) for name, value in metrics.items()}) if metrics else {},
    )


def default_stride(window: int) -> int:
    """Tokens from the start of one window to the next: half a window."""
    return max(1, window // 2)


def default_batch_tokens(device: torch.device) -> int:
    """Most tokens per batch of windows, padding included."""
    return 65536 if device.type == "cuda" else 4096


def check_spans(window: int | None, stride: int | None, batch_tokens: int) -> int | None:
    """Returns the stride.

    Raises:
        ValueError: a value is out of range.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride} needs a window; without one, full documents are scored")
        return None
    if window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for full documents")
    if stride is None:
        return default_stride(window)
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}, so that every token is scored")
    return stride


class Documents:
    """Documents in order, checked and counted as they are read: pairs of the index and the tokens."""

    def __init__(self, documents: Iterable[tuple[np.ndarray, int]], vocab_size: int, longest: int | None):
        self._source, self._vocab_size, self._longest = documents, vocab_size, longest
        self.bytes = self.documents = 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for tokens, n_bytes in self._source:
            tokens = np.asarray(tokens)
            if tokens.ndim != 1 or len(tokens) == 0 or tokens.dtype.kind not in "iu":
                raise ValueError(
                    f"document {self.documents}: got {tokens.dtype} of shape {tokens.shape}; "
                    "expected a 1-D array of token ids that starts with end-of-text"
                )
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._vocab_size:
                raise ValueError(
                    f"document {self.documents}: token id {low if low < 0 else high} is not in the model's "
                    f"vocabulary of {self._vocab_size}; the text was prepared with another tokenizer"
                )
            n = len(tokens) - 1
            if self._longest is not None and n > self._longest:
                raise ValueError(f"document {self.documents}: it has {n} tokens, more than longest={self._longest}")
            self.documents += 1
            self.bytes += int(n_bytes)
            yield self.documents - 1, tokens


def stream_nll(
    model,
    tokens: np.ndarray,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    metrics: dict[str, torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """Score sequences of equal length through the model's state, in chunks, so that memory for logits is bounded.

    The model should be in eval mode. No gradient is recorded.

    Args:
        tokens: (B, 1 + n) of integers; the first token of each sequence is context and is not scored.
        device, dtype: device of the model, dtype of autocast.
        metrics: the metrics of all forward passes are summed into it.

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
        with torch.no_grad(), autocast(device, dtype):
            output = model(ids[:, :-1], state=state, targets=ids[:, 1:])
        _add(metrics, output.metrics)
        yield output.nll.double().cpu()


def _add(sums: dict[str, torch.Tensor] | None, found: dict[str, torch.Tensor]) -> None:
    for name, value in found.items() if sums is not None else ():
        sums[name] = value if name not in sums else sums[name] + value


def _score_full(model, documents, device, dtype, metrics) -> Iterator[tuple[float, int]]:
    """Yields (nats, tokens) of each chunk of each document."""
    for number, tokens in documents:
        for chunk in stream_nll(model, tokens[None], device=device, dtype=dtype, metrics=metrics):
            nll = math.fsum(chunk[0].tolist())
            check_finite(nll, number)
            yield nll, chunk.shape[1]


def _joined(documents: Documents) -> Iterator[tuple[None, np.ndarray, np.ndarray]]:
    """All documents as one sequence with its targets, if there are any."""
    tokens, targets = join_documents(tokens for _, tokens in documents)
    if len(tokens):
        yield None, tokens, targets


def _score_windows(
    model, sequences, window, stride, batch_tokens, device, dtype, metrics, world
) -> Iterator[tuple[float, int]]:
    """Yields (nats, tokens) of each batch of this process. sequences: (document, tokens), or with targets of its own
    (document, tokens, targets)."""
    spans = (window, stride)
    windows = (w for number, tokens, *own in sequences for w in document_windows(number, tokens, *spans, *own))
    for (rows, width), counts in _own(batches(windows, window, batch_tokens), world):
        ids, targets = pad_rows(rows, width)
        scored, n_scored = np.flatnonzero(targets != IGNORED), (targets != IGNORED).sum(1).tolist()
        if not len(scored):  # of end-of-text alone; sharded models need the pass all the same
            counts, scored, targets = False, np.zeros(1, dtype=np.int64), ids
        ids, select, targets = (torch.from_numpy(x).to(device) for x in (ids, scored, targets.reshape(-1)[scored]))
        with autocast(device, dtype):
            output = model(ids, select=select, targets=targets)
        if not counts:
            yield 0.0, 0
            continue
        _add(metrics, output.metrics)
        nll = output.nll.double().cpu()
        for row, part in zip(rows, nll.split(n_scored), strict=True):
            check_finite(part.sum().item(), row.document)
        yield math.fsum(nll.tolist()), len(nll)


def _own(items: Iterator[T], world: World) -> Iterator[tuple[T, bool]]:
    """This process's items, and whether they count. All processes get equally many, as sharded models need: the last
    round is completed with items that another process counts."""
    while group := list(itertools.islice(items, world.size)):
        yield group[world.rank % len(group)], world.rank < len(group)


def check_finite(nll: float, document: int | None) -> None:
    """Raises NotFinite, which names the document; None: the text."""
    if not math.isfinite(nll):
        where = "the text" if document is None else f"document {document}"
        raise NotFinite(
            f"{where}: the likelihood is not finite ({nll}); the weights are damaged or diverged, "
            "or values overflow in this precision (try float32)"
        )
