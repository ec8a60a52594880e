"""Score-first fine-tuning: a chunk of text is scored, and then the model takes an optimizer step on it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fusedlm.evaluate.adapt.predictions import Sequences
from fusedlm.evaluate.score import check_finite
from fusedlm.evaluate.windows import IGNORED, Window, batches, pad_rows
from fusedlm.model.precision import autocast
from fusedlm.nn.low_rank import low_rank_deltas
from fusedlm.nn.module import parameters_by_kind


@dataclass(frozen=True)
class Finetune:
    """The gains of all norms, or low-rank deltas of all hidden matrices, are trained by AdamW while the text is scored.

    A chunk is consecutive windows that together score `chunk` tokens or a little more. All its tokens are scored with
    the weights from before the chunk; then comes `steps` times a step on the mean loss of these tokens. The model is as
    before when the text ends.
    """

    parameters: Literal["norms", "low_rank"] = "norms"
    rank: int = 4  # of the deltas
    lr: float = 3e-3
    chunk: int = 512  # tokens
    steps: int = 1  # on each chunk
    reset: bool = False  # whether each document begins with the model as it was; then no chunk crosses documents

    name = "finetune"

    def __post_init__(self):
        if self.parameters not in ("norms", "low_rank"):
            raise ValueError(f"parameters={self.parameters!r}: must be norms or low_rank")
        for name, least in (("rank", 1), ("chunk", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: must be greater than 0")

    def settings(self) -> dict:
        rank = {"rank": self.rank} if self.parameters == "low_rank" else {}
        values = {"lr": self.lr, "chunk": self.chunk, "steps": self.steps, "reset": self.reset}
        return {"parameters": self.parameters} | rank | values

    def run(
        self,
        model,
        sequences: Sequences,
        *,
        window: int,
        stride: int,
        batch_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int], None] | None,
    ) -> np.ndarray:
        """Adapted nats of each scored token, (n,) float64. The model should be in eval mode.

        Raises:
            ValueError: the model has no such parameters.
            NotFinite: the likelihood is not finite.
        """
        scored, starts = sequences.scored(), sequences.starts()
        nll, done = np.zeros(len(scored)), 0
        spans = {"window": window, "batch_tokens": batch_tokens, "device": device, "dtype": dtype}
        with _trainable(model, self) as parameters:
            learner = _Learner(model, parameters, self)
            for fresh, rows in self._chunks(sequences.windows(window, stride)):
                if fresh and self.reset:
                    learner.reset()
                for row, part in _score(model, rows, **spans):
                    check_finite(part.sum(), row.document)
                    where = np.arange(row.n_scored) + starts[row.document] + row.first
                    nll[where[scored[where]]] = part
                    done += len(part)
                    if progress is not None:
                        progress(done)
                learner.step(_training_windows(rows, sequences, window, stride), **spans)
        return nll[scored]

    def _chunks(self, windows: Iterator[Window]) -> Iterator[tuple[bool, list[Window]]]:
        """Yields the windows of each chunk, and whether it is the first of a document."""
        rows, n_scored, document, fresh = [], 0, None, True
        for window in windows:
            if rows and (n_scored >= self.chunk or (self.reset and window.document != document)):
                yield fresh, rows
                fresh, rows, n_scored = window.document != document, [], 0
            document = window.document
            rows.append(window)
            n_scored += window.n_scored
        if rows:
            yield fresh, rows


@contextlib.contextmanager
def _trainable(model: torch.nn.Module, settings: Finetune) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters to be trained, which alone require gradients; all is restored at the end."""
    with contextlib.ExitStack() as stack:
        if settings.parameters == "low_rank":
            parameters = stack.enter_context(low_rank_deltas(model, settings.rank))
        else:
            parameters = [p for _, kind, p in parameters_by_kind(model) if kind == "gain"]
        required = [(p, p.requires_grad) for p in model.parameters()]
        saved = [p.detach().clone() for p in parameters]
        for p, _ in required:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        try:
            yield parameters
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, saved, strict=True):
                    p.copy_(value)
                    p.grad = None
            for p, value in required:
                p.requires_grad_(value)


class _Learner:
    """Parameters that are trained on chunks, and can go back to the start."""

    def __init__(self, model, parameters: list[torch.nn.Parameter], settings: Finetune):
        self._model, self._parameters, self._settings = model, parameters, settings
        self._start = [p.detach().clone() for p in parameters]
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._parameters, lr=self._settings.lr, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def reset(self) -> None:
        for p, value in zip(self._parameters, self._start, strict=True):
            p.copy_(value)
        self._optimizer = self._new_optimizer()

    def step(self, rows: list[Window], *, window: int, batch_tokens: int, device, dtype) -> None:
        """Steps on the mean loss of the scored tokens of these windows."""
        n_tokens = sum(int((row.targets[len(row.targets) - row.n_scored :] != IGNORED).sum()) for row in rows)
        if n_tokens == 0:
            return
        weight = torch.tensor(1 / n_tokens, dtype=torch.float64, device=device)
        for _ in range(self._settings.steps):
            for batch, width in batches(rows, window, batch_tokens):
                ids, select, targets, _ = _inputs(batch, width, device)
                if len(select):
                    with torch.enable_grad(), autocast(device, dtype):
                        output = self._model(ids, select=select, targets=targets, loss_weight=weight)
                    output.losses["nll"].backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def _inputs(rows: list[Window], width: int, device):
    """Inputs, selection and its targets of a batch on the device, and the number of scored tokens of each row."""
    ids, targets = pad_rows(rows, width)
    select, counts = np.flatnonzero(targets != IGNORED), (targets != IGNORED).sum(1).tolist()
    tensors = (torch.from_numpy(x).to(device) for x in (ids, select, targets.reshape(-1)[select]))
    return *tensors, counts


@torch.no_grad()
def _score(model, rows: list[Window], *, window: int, batch_tokens: int, device, dtype):
    """Yields each window with the nats of its scored tokens."""
    for batch, width in batches(rows, window, batch_tokens):
        ids, select, targets, counts = _inputs(batch, width, device)
        if not len(select):
            continue
        with autocast(device, dtype):
            output = model(ids, select=select, targets=targets)
        yield from zip(batch, np.split(output.nll.double().cpu().numpy(), np.cumsum(counts)[:-1]), strict=True)


def _training_windows(rows: list[Window], sequences: Sequences, window: int, stride: int) -> list[Window]:
    """The same scored tokens in fewer windows: windows of at least half the length are scored anew, since a step on
    overlapping windows would compute their context again and again."""
    block = max(stride, window // 2)
    spans: list[list] = []  # document, first, stop
    for row in rows:
        if spans and spans[-1][0] == row.document and spans[-1][2] == row.first:
            spans[-1][2] += row.n_scored
        else:
            spans.append([row.document, row.first, row.first + row.n_scored])
    found = []
    for document, first, stop in spans:
        tokens, targets = sequences.tokens[document or 0], sequences.targets[document or 0]
        while first < stop:
            end = min(first + block, stop)
            start = max(0, end - window)
            found.append(Window(document, first, tokens[start:end], targets[start:end], end - first))
            first = end
    return found
