"""Forward and backward of a micro-batch as one CUDA graph, so that small models do not wait for kernel launches."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from fusedlm.model import Output
from fusedlm.train.micro_batch import forward_backward

_WARM_UPS = 2  # passes before the capture, which compile, autotune and allocate


class CapturedBackward:
    """Forward and backward by replaying a graph that was captured from the first micro-batch.

    The first micro-batch of another shape, which must be the first of a step, captures a new graph in place of the old
    one. Until then gradients stay in the same memory. Each replay draws new random numbers; warm-up and capture leave
    the device's RNG state unchanged.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager], *, accumulates: bool):
        """accumulates: whether a step has several micro-batches. If not, a replay overwrites the gradients."""
        self._model = model
        self._autocast = autocast
        self._accumulates = accumulates
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin_step(self) -> None:
        """Set gradients to zero if micro-batches accumulate into them."""
        if self._accumulates and self._graph is not None:
            torch._foreach_zero_([p.grad for p in self._model.parameters() if p.grad is not None])

    def __call__(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, loss_weight: torch.Tensor, batch_weight: float
    ) -> Output:
        """As `fusedlm.train.micro_batch.forward_backward`. The next call overwrites the tensors of the output."""
        if self._graph is not None and self._tokens.shape != tokens_BT.shape:
            self._graph = self._output = None
            self._model.zero_grad(set_to_none=True)  # gradients lie in the memory of the old graph
        if self._graph is None:
            self._capture(tokens_BT, targets_BT, loss_weight)
        self._tokens.copy_(tokens_BT)
        self._targets.copy_(targets_BT)
        self._loss_weight.copy_(loss_weight)
        self._batch_weight.fill_(batch_weight)
        self._graph.replay()
        return self._output

    def _capture(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, loss_weight: torch.Tensor) -> None:
        self._tokens, self._targets = tokens_BT.clone(), targets_BT.clone()
        self._loss_weight, self._batch_weight = loss_weight.clone(), torch.ones_like(loss_weight)
        rng = torch.cuda.get_rng_state(tokens_BT.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._backward()
                self._model.zero_grad(set_to_none=not self._accumulates)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the loader's, use the device during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._output = self._backward()
        torch.cuda.set_rng_state(rng, tokens_BT.device)
        self._graph = graph
        self.begin_step()

    def _backward(self) -> Output:
        weights = {"loss_weight": self._loss_weight, "batch_weight": self._batch_weight}
        return forward_backward(self._model, self._tokens, None, self._targets, autocast=self._autocast, **weights)
