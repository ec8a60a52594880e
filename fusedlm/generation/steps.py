"""Steps of a batch: one token of each row, from a state that grows or from a static one."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fusedlm.generation.sampling import Sampling, draw
from fusedlm.model.cast_weights import CastWeights
from fusedlm.model.precision import autocast
from fusedlm.model.waiting import waiting_module

_log = logging.getLogger("fusedlm.generation")

_RESERVED_TOKENS = 2**16  # a longer state grows as tokens come: max_tokens=1000000000 is rarely meant to be reached
_LEAST_CAPACITY = 256  # tokens of a row of a static state, which doubles when they do not suffice
_DRAWS = 64  # random numbers of a row that are on the device at a time
_NO_ID = -2  # -1 stands for logits that are not finite
_WARM_UPS = 2  # steps before a capture, which compile and allocate


@dataclass
class Row:
    """One sequence of a batch.

    index: of its prompt.
    ids: end-of-text and the prompt.
    generator: of its random numbers.
    """

    index: int
    ids: list[int]
    generator: torch.Generator


class Predictor:
    """A model with what its forward passes in decoding need.

    Args:
        model: with `init_state`, called as a `Decoder`.
        tokenizer: ids that it has no token for are never drawn; None: every id has one, and none is end-of-text.
        dtype: of autocast.
    """

    def __init__(self, model, tokenizer, device: torch.device, dtype: torch.dtype):
        self.model, self.eot_id = model, _NO_ID if tokenizer is None else tokenizer.eot_id
        self.device, self.dtype = device, dtype
        self._unused = None
        if tokenizer is not None:
            self._unused = torch.from_numpy(tokenizer.unused_ids(model.vocab_size)).to(device)
        self._weights = CastWeights(model, dtype)

    @torch.no_grad()
    def logits(self, tokens_BT: torch.Tensor, state, **arguments) -> torch.Tensor:
        """(..., vocab) float32; the tokens are appended to the state. -inf for ids without a token."""
        return self.logits_and_hidden(tokens_BT, state, **arguments)[0]

    @torch.no_grad()
    def logits_and_hidden(self, tokens_BT, state, **arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`logits`, and with hidden=True the output of the last block."""
        with self._weights.in_use(), autocast(self.device, self.dtype):
            output = self.model(tokens_BT, state=state, **arguments)
        return self._of_tokens(output.logits), output.hidden

    @torch.no_grad()
    def draft(self, depth: int, tokens_BT, hidden_BTD, state, lengths, last_B) -> tuple[torch.Tensor, torch.Tensor]:
        """`Decoder.draft`: its output (B, T, dim), and the logits (B, vocab) from it at place last_B of each row."""
        with self._weights.in_use(), autocast(self.device, self.dtype):
            hidden_BTD = self.model.draft(depth, tokens_BT, hidden_BTD, state, lengths)
            logits = self.model.head(at(hidden_BTD, last_B))
        return hidden_BTD, self._of_tokens(logits)

    def _of_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return logits if self._unused is None else logits.index_fill(-1, self._unused, -torch.inf)

    def last_logits(self, new: dict[int, list[int]], state) -> torch.Tensor:
        """(len(new), vocab) logits after the new ids of each row; all ids are appended to the state, whose other rows
        stay as they are."""
        return self.last_logits_and_hidden(new, state)[0]

    def last_logits_and_hidden(self, new: dict[int, list[int]], state, **arguments):
        """`last_logits`, and with hidden=True the output of the last block at all ids."""
        width = max(map(len, new.values()))
        lengths = [len(new.get(row, ())) for row in range(len(state.lengths))]
        tokens = [[*new.get(row, ()), *[0] * (width - n)] for row, n in enumerate(lengths)]
        last = [row * width + len(ids) - 1 for row, ids in new.items()]
        # Without padding the state need not keep a length per row.
        padding = {"lengths": lengths} if min(lengths) < width else {}
        select = torch.tensor(last, device=self.device)
        tokens = torch.tensor(tokens, device=self.device)
        return self.logits_and_hidden(tokens, state, select=select, **padding, **arguments)


def at(x_BTD: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    """(B, ...) the rows x[b, index_B[b]]; of a negative index the first."""
    index_B = index_B.clamp(min=0).view(-1, *[1] * (x_BTD.dim() - 1))
    return x_BTD.gather(1, index_B.expand(-1, 1, *x_BTD.shape[2:]))[:, 0]


def graph_obstacle(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why steps of a model, with activations in dtype, cannot be captured in a CUDA graph; None: they can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if waiting := waiting_module(model, device, dtype):
        name, module = waiting
        return f"{name} ({type(module).__name__}) waits for the device"
    return None


def capture(
    device: torch.device, run: Callable, pool: tuple[int, int] | None = None
) -> tuple[torch.cuda.CUDAGraph | None, object, str | None]:
    """A CUDA graph of run() and what it returned; without a graph, why the capture failed. pool: memory that it shares
    with other graphs (`torch.cuda.graph_pool_handle`), each of which may overwrite what another one returned."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may use the device during the capture.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            returned = run()
    except RuntimeError as error:
        return None, None, str(error).splitlines()[0]
    return graph, returned, None


class GrowingSteps:
    """Steps with a state that grows with the tokens. Rows that have ended take no more of them."""

    reason = None

    def __init__(self, predictor: Predictor, sampling: Sampling):
        self._predictor, self._sampling = predictor, sampling

    def run(self, rows: list[Row]) -> Iterator[list[int]]:
        """After the prefill and after each step, the token of every row: end-of-text for rows that have ended, -1 where
        the logits are not finite. At most max_tokens of them."""
        predictor, sampling = self._predictor, self._sampling
        # The last token is not fed back, hence the -1.
        reserved = max(len(row.ids) for row in rows) + sampling.max_tokens - 1
        fits = reserved * len(rows) <= _RESERVED_TOKENS
        state = predictor.model.init_state(len(rows), max_tokens=reserved if fits else None)
        new = {i: row.ids for i, row in enumerate(rows)}  # of the rows that have not ended
        for _ in range(sampling.max_tokens):
            logits = predictor.last_logits(new, state)
            uniform = None
            if sampling.temperature > 0:
                uniform = _uniform([rows[i] for i in new], 1)[:, 0].to(logits.device)
            drawn = draw(logits, uniform, sampling).tolist()
            tokens = [predictor.eot_id] * len(rows)
            for i, token in zip(new, drawn, strict=True):
                tokens[i] = token
            yield tokens
            new = {i: [tokens[i]] for i in new if tokens[i] != predictor.eot_id}
            if not new:
                return


class StaticSteps:
    """Steps with a static state, in which the host does nothing that depends on a token: one CUDA graph each, where the
    device has them. The same object decodes one batch after another, in the same memory and with the same graph.

    The tokens of a step are read while the next one runs, so that one step too many may run after the last row has
    ended.

    graphed: steps so far that were replays of a graph.
    reason: why the last capture failed; None: it did not.
    """

    _draws_per_step = 1  # random numbers of a row in each step

    def __init__(
        self, predictor: Predictor, sampling: Sampling, n_rows: int, *, graph: bool, compilation: dict | None = None
    ):
        """graph: capture steps; needs `graph_obstacle` to be None. compilation: options of torch.compile for the
        layers and the draw; None: they run uncompiled."""
        device = predictor.device
        predictor.model.compile_steps(compilation)
        self._draw = draw if compilation is None else torch.compile(draw, dynamic=False, **compilation)
        self._predictor, self._sampling, self.n_rows = predictor, sampling, n_rows
        self._captures, self._graph, self._warm = graph, None, 0
        self.graphed, self.reason = 0, None
        self.state = None
        self._rows: list[Row] = []  # whose random numbers are drawn; without any they are 0
        self._n_used = 0
        self._fed_B1 = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        self._tokens_B = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._ended_B = torch.zeros(n_rows, dtype=torch.bool, device=device)
        n_draws = _DRAWS * self._draws_per_step
        self._uniform_BK = torch.zeros(n_rows, n_draws, dtype=torch.float64, device=device)
        self._n_drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self._readers = [Reader(self._tokens_B, device) for _ in range(2)]

    def run(self, rows: list[Row]) -> Iterator[list[int]]:
        """As `GrowingSteps.run`, of n_rows rows."""
        longest = max(len(row.ids) for row in rows)
        self._rows, self._n_used = rows, 0
        for i in range(self._sampling.max_tokens):
            if i == 0:
                self._prefill(rows, longest)
            else:
                self._make_room(longest + i, longest)
                self.step()
            self._readers[i % 2].send(self._tokens_B)
            if i > 0:
                yield self._readers[(i - 1) % 2].receive()
        yield self._readers[(self._sampling.max_tokens - 1) % 2].receive()

    @torch.no_grad()
    def _prefill(self, rows: list[Row], longest: int) -> None:
        prompt_state = self._predictor.model.init_state(len(rows))
        logits = self._predictor.last_logits({i: row.ids for i, row in enumerate(rows)}, prompt_state)
        if self.state is None:
            self.adopt(prompt_state, self._capacity(longest + 1, longest))
        else:
            self._make_room(longest + 1, longest)
            self.state.load(prompt_state)
        self._ended_B.zero_()
        self._refill()
        self._accept(logits)

    def adopt(self, state, capacity: int) -> None:
        """Decode from this state, which becomes static, with room for `capacity` tokens."""
        state.make_static(capacity)
        self.state = state
        self._forget_graph()

    def _make_room(self, needed: int, longest: int) -> None:
        """For so many tokens per row now."""
        if needed > self.state.capacity:
            self._forget_graph()  # before the memory that it uses
            self.state.make_static(self._capacity(needed, longest))

    def _capacity(self, needed: int, longest: int) -> int:
        """A power of two, so that the state seldom has to grow, or what max_tokens need in the end."""
        return max(needed, min(self._most(longest), max(_LEAST_CAPACITY, 1 << (needed - 1).bit_length())))

    def _most(self, longest: int) -> int:
        """Tokens of a row in the end."""
        return longest + self._sampling.max_tokens - 1

    def _forget_graph(self) -> None:
        self._graph, self._warm = None, 0

    def _refill(self) -> None:
        """Before each draw: when the random numbers on the device are used up, the next ones."""
        if self._sampling.temperature > 0 and self._n_used % _DRAWS == 0:
            if self._rows:
                uniform = _uniform(self._rows, self._uniform_BK.shape[1])
                if self._uniform_BK.is_cuda:
                    uniform = uniform.pin_memory()
                self._uniform_BK.copy_(uniform, non_blocking=True)
            self._n_drawn.zero_()
        self._n_used += 1

    def step(self) -> None:
        """Feed the last token of every row, and draw the next one."""
        self._refill()
        if self._graph is not None:
            self._replay()
        elif not self._captures or self._warm < _WARM_UPS:
            self._warm += 1
            self._step()
        else:
            self._capture()
            self._step() if self._graph is None else self._replay()

    def _replay(self) -> None:
        with torch.cuda.device(self._predictor.device):
            self._graph.replay()
        self.graphed += 1

    def _capture(self) -> None:
        self._graph, _, reason = capture(self._predictor.device, self._step)
        if self._graph is None:
            self._captures, self.reason = False, reason
            _log.warning("steps run without a CUDA graph: %s", self.reason)
            return
        _log.info("steps of %d rows with room for %d tokens: one CUDA graph", self.n_rows, self.state.capacity)

    @torch.no_grad()
    def _step(self) -> None:
        self._accept(self._predictor.logits(self._fed_B1, self.state)[:, -1])

    def _accept(self, logits_BV: torch.Tensor) -> None:
        """Draw the next token of each row. Finished rows are computed too; their length stays the same."""
        uniform_B = None
        if self._sampling.temperature > 0:
            uniform_B = self._uniform_BK.index_select(1, self._n_drawn)[:, 0]
            self._n_drawn += 1
        tokens_B, eot_id = self._tokens_B, self._predictor.eot_id
        tokens_B.copy_(self._draw(logits_BV, uniform_B, self._sampling)).masked_fill_(self._ended_B, eot_id)
        torch.logical_and(tokens_B != eot_id, tokens_B >= 0, out=self.state.growing_B)
        torch.logical_not(self.state.growing_B, out=self._ended_B)
        torch.clamp(tokens_B, min=0, out=self._fed_B1[:, 0])


class Reader:
    """Tokens on their way to the host."""

    def __init__(self, like: torch.Tensor, device: torch.device):
        cuda = device.type == "cuda"
        self._device = device
        self._tokens_B = torch.zeros(like.shape, dtype=torch.int64, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None

    def send(self, tokens_B: torch.Tensor) -> None:
        self._tokens_B.copy_(tokens_B, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def receive(self) -> list:
        if self._event is not None:
            self._event.synchronize()
        return self._tokens_B.tolist()


def _uniform(rows: list[Row], n: int) -> torch.Tensor:
    """(rows, n) float64, the next n random numbers of each row, from its own generator on the CPU: the same ones
    however many are taken at a time."""
    return torch.stack([torch.rand(n, generator=row.generator, dtype=torch.float64) for row in rows])
