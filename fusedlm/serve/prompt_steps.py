"""Short pieces of prompts, read in a static state: one CUDA graph for each number of rows and width."""

import logging
from collections.abc import Callable, Sequence

import torch

from fusedlm.generation.steps import Predictor, capture, graph_obstacle
from fusedlm.model.rows import Row, empty_row, put_row, static_rows

_log = logging.getLogger("fusedlm.serve")

_WIDTHS = (32, 64, 128, 256)
_ROWS = (1, 4, 16)
_SCORES = 2**22  # of a head at most: torch's attention to a static state computes those of all that it has room for
_WARM_UPS = 2  # passes before a capture, which compile and allocate


class PromptSteps:
    """The host takes longer to launch the kernels of a short prompt than the device to run them, whatever its length.
    Here it launches a graph, with the tokens padded to one of a few widths and the rows to one of a few numbers.

    The rows are copied into a static state of its own, and out of it when they have been read: until the next `read`
    they are there.

    graphed: pieces that were replays of a graph. reason: why pieces are not read here; None: they are.
    """

    def __init__(
        self, predictor: Predictor, most_tokens: int, free_bytes: Callable[[], int], cuda_graph: bool | None = None
    ):
        """
        Args:
            most_tokens: of a row.
            free_bytes: asked before the state is allocated, which takes at most that.
            cuda_graph: None: where possible; False: pieces are not read here.
        """
        self._predictor, self._most, self._free_bytes = predictor, most_tokens, free_bytes
        self.reason = graph_obstacle(predictor.model, predictor.device, predictor.dtype)
        if cuda_graph is False:
            self.reason = "switched off"
        self._captures = True
        self.state = None
        self._sizes: list[int] = []  # numbers of rows
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: tuple[int, int] | None = None  # memory that all graphs share: logits are used before the next one
        self._warm: dict[tuple[int, int], int] = {}
        self.graphed = 0

    def fits(self, n_rows: int, width: int) -> bool:
        """Whether so many rows of at most `width` new tokens each can be read here."""
        if self.reason is not None or width > _WIDTHS[-1] or n_rows > _ROWS[-1]:
            return False
        if self.state is not None and n_rows > self._sizes[-1]:
            return False
        return _least(_ROWS, n_rows) * _least(_WIDTHS, width) * self._capacity <= _SCORES

    @property
    def _capacity(self) -> int:
        return self._most + _WIDTHS[-1] + 1  # padding is written behind the tokens of a row

    @torch.no_grad()
    def read(self, rows: Sequence[Row], new: Sequence[Sequence[int]], like: Row) -> torch.Tensor | None:
        """Append the new tokens to the rows.

        Args:
            rows: which `fits`; `state` then has them in this order.
            like: any row that has seen a token.

        Returns:
            (n, V) float32 logits after the last token of each, until the next call; None: there is no memory for the
            state, and nothing is read here from now on.
        """
        if self.state is None and not self._allocate(like):
            return None
        if len(rows) > self._sizes[-1]:
            return None
        n, width = _least(self._sizes, len(rows)), _least(_WIDTHS, max(map(len, new)))
        for b, row in enumerate(rows):
            put_row(self.state, b, row)
        self.state.set_lengths([*(row.length for row in rows), *[0] * (self._sizes[-1] - len(rows))])
        padded = [[*ids, *[0] * (width - len(ids))] for ids in new] + [[0] * width] * (n - len(rows))
        counts = [*map(len, new), *[0] * (n - len(rows))]
        self._tokens[:n, :width].copy_(torch.tensor(padded))
        self._n_new_B[:n].copy_(torch.tensor(counts))
        self._last_B[:n].copy_(torch.tensor([b * width + max(0, count - 1) for b, count in enumerate(counts)]))
        return self._logits(n, width)[: len(rows)]

    def warm_up(self, like: Row) -> None:
        """Capture all graphs now. like: as for `read`."""
        for n in _ROWS:
            for width in _WIDTHS:
                for _ in range(_WARM_UPS + 1):
                    if self.fits(n, width):
                        self.read([empty_row()] * n, [[0] * width] * n, like)

    def _allocate(self, like: Row) -> bool:
        small, large = (static_rows(self._predictor.model, like, 1, length).nbytes() for length in (64, 128))
        n_bytes = small + (self._capacity - 64) * (large - small) / 64
        self._sizes = [n for n in _ROWS if n * n_bytes <= self._free_bytes()]
        if not self._sizes:
            self.reason = f"a row of {self._capacity} tokens does not fit into the memory that is left"
            _log.warning("prompts are read without a CUDA graph: %s", self.reason)
            return False
        n_rows, device = self._sizes[-1], self._predictor.device
        self.state = static_rows(self._predictor.model, like, n_rows, self._capacity, spare=_WIDTHS[-1])
        self._tokens = torch.zeros(n_rows, _WIDTHS[-1], dtype=torch.int64, device=device)
        self._n_new_B = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._last_B = torch.zeros(n_rows, dtype=torch.int64, device=device)
        return True

    def _logits(self, n: int, width: int) -> torch.Tensor:
        key = n, width
        if self._captures and self._predictor.device.type == "cuda":
            if key not in self._graphs and self._warm.get(key, 0) >= _WARM_UPS:
                self._capture(n, width)
            if key in self._graphs:
                graph, logits = self._graphs[key]
                with torch.cuda.device(self._predictor.device):
                    graph.replay()
                self.graphed += 1
                return logits
        self._warm[key] = self._warm.get(key, 0) + 1
        return self._run(n, width)

    def _run(self, n: int, width: int) -> torch.Tensor:
        view = self.state.first_rows(n)
        mark = view.mark()
        tokens = self._tokens[:n, :width].contiguous()
        logits = self._predictor.logits(tokens, view, lengths=self._n_new_B[:n], select=self._last_B[:n])
        view.release(mark)
        return logits

    def _capture(self, n: int, width: int) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, logits, reason = capture(self._predictor.device, lambda: self._run(n, width), self._pool)
        if graph is None:
            self._captures, self.reason = False, reason  # the pieces after this one are read as long ones are
            _log.warning("prompts are read without a CUDA graph: %s", reason)
            return
        self._graphs[n, width] = graph, logits
        _log.info("pieces of prompts of %d rows and %d tokens: one CUDA graph", n, width)


def _least(sizes: Sequence[int], n: int) -> int:
    """The smallest of the sizes that is at least n."""
    return next(size for size in sizes if size >= n)
