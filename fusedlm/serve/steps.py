"""One decoding step of the sequences in the slots, as a CUDA graph where the device has them."""

import logging

import torch

from fusedlm.generation.steps import Predictor, capture, graph_obstacle
from fusedlm.model.rows import Row
from fusedlm.serve.slots import Slots

_log = logging.getLogger("fusedlm.serve")

_WARM_UPS = 2  # steps before a capture, which compile and allocate


class DecodeSteps:
    """On a GPU steps have one of a few batch sizes, so that each size is captured once; rows that no sequence has are
    computed and ignored. Elsewhere a step has as many rows as there are sequences.

    graphed: steps that were replays of a graph. reason: why there are no graphs; None: there are.
    """

    def __init__(self, predictor: Predictor, slots: Slots, cuda_graph: bool | None = None):
        """cuda_graph: None: where possible.

        Raises:
            ValueError: cuda_graph is True and a graph is not possible here.
        """
        self._predictor, self._slots = predictor, slots
        self.reason = graph_obstacle(predictor.model, predictor.device, predictor.dtype)
        if cuda_graph and self.reason:
            raise ValueError(f"cuda_graph=True: {self.reason}; leave it out to decode without a graph")
        if cuda_graph is False:
            self.reason = "switched off"
        self._sizes = _sizes(slots.max_rows) if predictor.device.type == "cuda" else range(1, slots.max_rows + 1)
        self._fed_B1 = torch.zeros(slots.max_rows, 1, dtype=torch.int64, device=predictor.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._warm: dict[int, int] = {}
        self._generation = -1
        self.graphed = 0

    def warm_up(self, like: Row) -> None:
        """Capture all graphs now, while no sequence has a slot. like: a row that has seen a token."""
        n_steps = len(self._sizes) * (_WARM_UPS + 1)
        if self.reason is not None or like.length + n_steps > self._slots.most_tokens:
            return
        for size in self._sizes:
            while len(self._slots) < size:
                self._slots.append(like)
            for _ in range(_WARM_UPS + 1):
                self.step([0] * size)
        while len(self._slots):
            self._slots.remove(len(self._slots) - 1)

    @torch.no_grad()
    def step(self, tokens: list[int]) -> torch.Tensor:
        """Feed a token to every sequence in the slots; returns (n, vocab) float32 logits, until the next step."""
        n = len(tokens)
        size = next(size for size in self._sizes if size >= n)
        view = self._slots.view(size)
        if self._slots.generation != self._generation:
            self._graphs, self._warm, self._generation = {}, {}, self._slots.generation
        self._fed_B1[:n, 0].copy_(torch.tensor(tokens))
        logits = self._logits(view, size)[:n]
        self._slots.advance()
        return logits

    def _logits(self, view, size: int) -> torch.Tensor:
        if self.reason is None and size not in self._graphs and self._warm.get(size, 0) >= _WARM_UPS:
            self._capture(view, size)
        if size not in self._graphs:
            self._warm[size] = self._warm.get(size, 0) + 1
            return self._run(view, size)
        graph, logits = self._graphs[size]
        with torch.cuda.device(self._predictor.device):
            graph.replay()
        self.graphed += 1
        return logits

    def _run(self, view, size: int) -> torch.Tensor:
        return self._predictor.logits(self._fed_B1[:size], view)[:, -1]

    def _capture(self, view, size: int) -> None:
        graph, logits, self.reason = capture(self._predictor.device, lambda: self._run(view, size))
        if graph is None:
            _log.warning("steps run without a CUDA graph: %s", self.reason)
            return
        self._graphs[size] = graph, logits
        _log.info("steps of %d rows with room for %d tokens: one CUDA graph", size, view.capacity)


def _sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 8 up to 64 and of 32 beyond."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, most + 32, 32)]
    return sorted({min(size, most) for size in sizes})
