"""Forward and backward of a micro-batch as one CUDA graph: one launch, where small models else wait for the host."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

_WARM_UPS = 2  # passes before the capture: they compile, tune and allocate what a capture must not


class CapturedBackward:
    """Adds the gradient of a micro-batch's share of the loss to the parameters, by replaying a graph captured from the
    first micro-batch. Every later one has its shape; the gradients stay in the same memory for good.

    Random numbers of the device go on from replay to replay, and the capture itself draws none.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager], *, accumulates: bool):
        """accumulates: whether a step has several micro-batches; with one, a replay overwrites the gradients."""
        self._model = model
        self._autocast = autocast
        self._accumulates = accumulates
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin_step(self) -> None:
        """Gradients to zero, where micro-batches add to them."""
        if self._accumulates and self._graph is not None:
            torch._foreach_zero_([p.grad for p in self._model.parameters() if p.grad is not None])

    def __call__(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, n_valid: int) -> torch.Tensor:
        """The loss () of the micro-batch, its sum over n_valid; the tensor is overwritten by the next call."""
        if self._graph is None:
            self._capture(tokens_BT, targets_BT, n_valid)
        self._tokens.copy_(tokens_BT)
        self._targets.copy_(targets_BT)
        self._n_valid.fill_(n_valid)
        self._graph.replay()
        return self._loss

    def _capture(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, n_valid: int) -> None:
        self._tokens, self._targets = tokens_BT.clone(), targets_BT.clone()
        self._n_valid = torch.full((), n_valid, dtype=torch.float64, device=tokens_BT.device)
        rng = torch.cuda.get_rng_state(tokens_BT.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._backward()
                self._model.zero_grad(set_to_none=not self._accumulates)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, the loader's above all, go on using the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._loss = self._backward()
        torch.cuda.set_rng_state(rng, tokens_BT.device)
        self._graph = graph
        self.begin_step()

    def _backward(self) -> torch.Tensor:
        with self._autocast():
            loss = self._model.weighted_loss(self._tokens, self._targets, 1 / self._n_valid)
        loss.backward()
        return loss.detach()
