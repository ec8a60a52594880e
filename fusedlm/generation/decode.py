"""Decoding of batches to text."""

import contextlib
from collections.abc import Iterator

import torch

from fusedlm.generation.acceptance import Speculation
from fusedlm.generation.sampling import NOT_FINITE, Sampling
from fusedlm.generation.speculation import SpeculativeSteps
from fusedlm.generation.steps import GrowingSteps, Predictor, Row, StaticSteps, graph_obstacle
from fusedlm.generation.text import TextStream


class BatchDecoder:
    """Decodes batches of one model, one after another.

    Steps are CUDA graphs over a static state where that is possible. Elsewhere the state grows, which on the CPU costs
    less than attention to all the room that a static one has; tokens are the same up to rounding. Speculative steps
    have a static state everywhere.

    graphed_steps: so far.
    """

    def __init__(
        self,
        model,
        tokenizer,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graph: bool | None = None,
        compile: bool = False,
        speculation: Speculation | None = None,
    ):
        """cuda_graph: None: where possible. compile: with torch.compile, of steps with a graph. speculation: steps with
        drafts, which it counts; None: without.

        Raises:
            ValueError: cuda_graph or compile is True, and a graph is not possible here; or the model cannot draft.
        """
        if speculation is not None and getattr(model, "mtp", None) is None:
            raise ValueError(
                f"speculate={speculation.draft_tokens}: the model has no multi-token prediction to draft with; train "
                "one with model.mtp, or leave speculate out"
            )
        if speculation is not None and compile:
            raise ValueError("compile=True compiles steps of one token; leave it out, or speculate")
        self._speculation = speculation
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._device, self._dtype = device, dtype
        obstacle = graph_obstacle(model, device, dtype)
        if compile and cuda_graph is False:
            raise ValueError("compile=True compiles the steps of a CUDA graph; leave out cuda_graph=False")
        for name, wanted in (("cuda_graph", cuda_graph), ("compile", compile)):
            if wanted and obstacle:
                raise ValueError(f"{name}=True: {obstacle}; leave it out to decode without a graph")
        self._compilation = {} if compile else None
        self._required = bool(cuda_graph)
        self._graph = obstacle is None if cuda_graph is None else cuda_graph
        self._predictor: Predictor | None = None
        self._static: StaticSteps | None = None
        self._graphed_before = 0

    @property
    def graphed_steps(self) -> int:
        return self._graphed_before + (0 if self._static is None else self._static.graphed)

    def decode(self, rows: list[Row]) -> Iterator[tuple[int, str]]:
        """Continue rows of any lengths together: one prefill, then one token of each per step, until all have ended.
        Ids that the tokenizer has no token for are never drawn.

        Yields:
            (index of the prompt, non-empty piece of its text); the pieces of one prompt in order.

        Raises:
            ValueError: the model's logits are not finite, or the capture failed and cuda_graph is True.
        """
        texts = {i: TextStream(self._tokenizer, row.ids) for i, row in enumerate(rows)}  # of rows that have not ended
        was_training = self._model.training
        self._model.eval()
        try:
            steps = self._steps(len(rows))
            with contextlib.closing(steps.run(rows)) as tokens_of_steps:
                for tokens in tokens_of_steps:
                    if self._required and steps.reason:
                        raise ValueError(f"cuda_graph=True: {steps.reason}; leave it out to decode without a graph")
                    for i in list(texts):
                        if tokens[i] < 0:
                            raise ValueError(NOT_FINITE)
                        ended = tokens[i] == self._tokenizer.eot_id
                        piece = texts.pop(i).finish() if ended else texts[i].add(tokens[i])
                        if piece:
                            yield rows[i].index, piece
                    if not texts:
                        return
            for i, text in texts.items():
                if piece := text.finish():
                    yield rows[i].index, piece
        finally:
            self._model.train(was_training)

    def _steps(self, n_rows: int) -> GrowingSteps | StaticSteps:
        if self._predictor is None:
            self._predictor = Predictor(self._model, self._tokenizer, self._device, self._dtype)
        if not self._graph and self._speculation is None:
            return GrowingSteps(self._predictor, self._sampling)
        if self._static is None or self._static.n_rows != n_rows:
            self._graphed_before = self.graphed_steps
            self._static = None  # its memory is needed
            self._static = self._static_steps(n_rows)
        return self._static

    def _static_steps(self, n_rows: int) -> StaticSteps:
        steps = (self._predictor, self._sampling, n_rows)
        if self._speculation is not None:
            return SpeculativeSteps(*steps, self._speculation, graph=self._graph)
        return StaticSteps(*steps, graph=True, compilation=self._compilation)
