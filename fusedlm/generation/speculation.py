"""Speculative decoding: the modules of multi-token prediction draft tokens, which the model verifies in one pass."""

from collections import deque
from collections.abc import Iterator

import torch

from fusedlm.generation.acceptance import Speculation, accept
from fusedlm.generation.sampling import Sampling, draw, probabilities
from fusedlm.generation.steps import Predictor, Reader, Row, StaticSteps, at


class SpeculativeSteps(StaticSteps):
    """Steps that append up to K + 1 tokens to each row: the model reads the last token and the K drafts after it in one
    pass, drafts are kept as `accept` says, the state goes back to the last token kept in each row, and the modules
    draft the next K. All of it is one CUDA graph, where the device has them.

    Module k reads the output of module k - 1 at a position and the token k places later. Where that token is not known
    yet it reads a draft; its state then goes back before this position, which it reads again when the token is known.
    Drafts beyond the depth D of the model come from module D again, at the positions that follow, with its own output
    in place of that of module D - 1.
    """

    def __init__(
        self, predictor: Predictor, sampling: Sampling, n_rows: int, speculation: Speculation, *, graph: bool
    ):
        """graph: as `StaticSteps` takes it."""
        self._n_drafts = speculation.draft_tokens
        self._draws_per_step = 2 * self._n_drafts + 1
        super().__init__(predictor, sampling, n_rows, graph=graph)
        self._speculation, device = speculation, predictor.device
        self._depth = min(len(predictor.model.mtp), self._n_drafts)
        self._draft_states: list = []
        self._carried_B1D: list[torch.Tensor] = []
        self._drafts_BK = torch.zeros(n_rows, self._n_drafts, dtype=torch.int64, device=device)
        self._draft_p_BKV: torch.Tensor | None = None
        self._n_made_B = torch.zeros(n_rows, dtype=torch.int64, device=device)
        # The tokens of a step, how many of them count, and how many drafts were kept.
        self._found = torch.zeros(n_rows, self._n_drafts + 3, dtype=torch.int64, device=device)
        self._readers = [Reader(self._found, device) for _ in range(2)]

    def run(self, rows: list[Row]) -> Iterator[list[int]]:
        """As `GrowingSteps.run`, of n_rows rows. Rows may be several tokens ahead of what is returned."""
        longest, most, eot_id = max(len(row.ids) for row in rows), self._sampling.max_tokens, self._predictor.eot_id
        self._rows, self._n_used = rows, 0
        queues, made, ended = [deque() for _ in rows], [0] * len(rows), [False] * len(rows)
        n_steps = n_yielded = 0
        while not all(ended):
            if n_steps == 0:
                self._prefill(rows, longest)
            else:
                self._make_room(self._needed(longest, max(made)), longest)
                self.step()
            self._readers[n_steps % 2].send(self._found)
            n_steps += 1
            if n_steps == 1:
                continue
            found = self._readers[n_steps % 2].receive()
            for i, (*tokens, n, n_kept) in enumerate(found):
                if ended[i]:
                    continue
                queues[i] += tokens[:n]
                made[i] += n
                ended[i] = made[i] >= most or tokens[n - 1] == eot_id or tokens[n - 1] < 0
                if n_steps > 2:
                    self._speculation.count(min(n_kept, n))
            while n_yielded < most and all(queue or end for queue, end in zip(queues, ended, strict=True)):
                if not any(queues):
                    return
                n_yielded += 1
                yield [queue.popleft() if queue else eot_id for queue in queues]

    def _needed(self, longest: int, made: int) -> int:
        """Room for the step whose results are not known yet, for this one, and for what the modules take back."""
        return longest + made + 2 * (self._n_drafts + 1) + 2 * self._n_drafts

    def _most(self, longest: int) -> int:
        return longest + self._sampling.max_tokens + 5 * self._n_drafts + 2

    @torch.no_grad()
    def _prefill(self, rows: list[Row], longest: int) -> None:
        predictor, model = self._predictor, self._predictor.model
        prompt_state = model.init_state(len(rows))
        prompts = {i: row.ids for i, row in enumerate(rows)}
        logits_BV, hidden_BTD = predictor.last_logits_and_hidden(prompts, prompt_state, hidden=True)
        lengths_B = torch.tensor([len(row.ids) for row in rows], device=predictor.device)
        self._ended_B.zero_()
        self._n_made_B.zero_()
        self._refill()
        uniform_BN = self._next_uniform()
        first_B1 = draw(logits_BV, _column(uniform_BN, self._n_drafts), self._sampling)[:, None]
        self._emit(torch.nn.functional.pad(first_B1, (0, self._n_drafts)), torch.zeros_like(lengths_B))
        # Of each position of the prompt the token after it.
        tokens = torch.tensor([[*row.ids[1:], *[0] * (longest + 1 - len(row.ids))] for row in rows])
        tokens_BT = tokens.to(predictor.device).scatter(1, lengths_B[:, None] - 1, first_B1.clamp(min=0))
        draft_states = [model.init_draft_state(k + 1, len(rows)) for k in range(self._depth)]
        carried = self._draft(draft_states, tokens_BT, hidden_BTD, lengths_B, None, uniform_BN)
        if self.state is None:
            self.adopt(prompt_state, self._capacity(self._needed(longest, 0), longest), draft_states, carried)
            return
        self._make_room(self._needed(longest, 0), longest)
        for own, new in zip((self.state, *self._draft_states), (prompt_state, *draft_states), strict=True):
            own.load(new)
        for own, new in zip(self._carried_B1D, carried, strict=True):
            own.copy_(new)

    def adopt(self, state, capacity: int, draft_states: list, carried: list[torch.Tensor]) -> None:
        """Decode from these states, which become static, with room for `capacity` tokens."""
        state.make_static(capacity, self._n_drafts + 1)
        for draft_state in draft_states:
            draft_state.make_static(capacity, 2 * self._n_drafts)
        self.state, self._draft_states, self._carried_B1D = state, draft_states, [x.clone() for x in carried]
        self._forget_graph()

    def _make_room(self, needed: int, longest: int) -> None:
        if needed > self.state.capacity:
            self._forget_graph()
            capacity = self._capacity(needed, longest)
            for state in (self.state, *self._draft_states):
                state.make_static(capacity)

    def _next_uniform(self) -> torch.Tensor | None:
        """(B, 2 K + 1) random numbers: K that decide on drafts, one of the token after them, K of the next drafts."""
        if self._sampling.temperature == 0:
            return None
        index = self._n_drawn + torch.arange(self._draws_per_step, device=self._n_drawn.device)
        self._n_drawn += self._draws_per_step
        return self._uniform_BK.index_select(1, index)

    @torch.no_grad()
    def _step(self) -> None:
        fed_BT = torch.cat([self._fed_B1, self._drafts_BK], dim=1)
        mark = self.state.mark()
        logits_BTV, hidden_BTD = self._predictor.logits_and_hidden(fed_BT, self.state, hidden=True)
        uniform_BN = self._next_uniform()
        decide_BT = None if uniform_BN is None else uniform_BN[:, : self._n_drafts + 1]
        tokens_BT, n_kept_B = accept(logits_BTV, self._drafts_BK, self._draft_p_BKV, decide_BT, self._sampling)
        n_new_B = self._emit(tokens_BT, n_kept_B)
        self.state.rollback(mark, n_new_B)
        carried = self._draft(
            self._draft_states, tokens_BT.clamp(min=0), hidden_BTD, n_new_B, self._carried_B1D, uniform_BN
        )
        for own, new in zip(self._carried_B1D, carried, strict=True):
            own.copy_(new)

    def _emit(self, tokens_BT: torch.Tensor, n_kept_B: torch.Tensor) -> torch.Tensor:
        """Append the first n_kept_B + 1 tokens of each row, up to its end; (B,) how many these are. Rows may get up to
        K more than max_tokens."""
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        ends_BT = (tokens_BT == self._predictor.eot_id) | (tokens_BT < 0)
        n_to_end_B = torch.where(ends_BT, index_T + 1, len(index_T) + 1).amin(1)
        n_new_B = torch.minimum(n_kept_B + 1, n_to_end_B).masked_fill(self._ended_B, 0)
        self._n_made_B += n_new_B
        self._ended_B |= (n_to_end_B <= n_new_B) | (self._n_made_B >= self._sampling.max_tokens)
        self._fed_B1.copy_(at(tokens_BT, n_new_B - 1).clamp(min=0)[:, None])
        self._found.copy_(torch.cat([tokens_BT, n_new_B[:, None], n_kept_B[:, None]], dim=1))
        return n_new_B

    def _draft(self, states, tokens_BT, hidden_BTD, n_new_B, carried_B1D, uniform_BN) -> list[torch.Tensor]:
        """Append n_new_B positions to the states of the modules, and draft.

        Args:
            tokens_BT: (B, T) the token after each position; those that count first.
            hidden_BTD: (B, T, dim) of the last block at these positions.
            carried_B1D: of every module but the last its output at the last position whose tokens were known before;
                None: there were no positions before.

        Returns:
            The next `carried_B1D`.
        """
        tokens_BT = torch.nn.functional.pad(tokens_BT, (0, self._n_drafts))
        next_carried, drafts, draft_p, last_B = [], [], [], n_new_B - 1
        for k in range(1, self._n_drafts + 1):
            if k > self._depth:  # the last module once more
                given_BT, hidden_BTD = drafts[-1][:, None], at(hidden_BTD, last_B)[:, None]
                last_B, lengths_B = torch.zeros_like(last_B), None
            elif carried_B1D is None:
                given_BT = tokens_BT[:, k - 1 : k - 1 + hidden_BTD.shape[1]]
                lengths_B = n_new_B
                # In a prompt shorter than k tokens the first position stands for those that are missing.
                keep_B = (n_new_B - k + 1).clamp(min=1)
            else:
                if k > 1:
                    hidden_BTD = torch.cat([carried_B1D[k - 2], hidden_BTD], dim=1)
                given_BT = tokens_BT[:, : hidden_BTD.shape[1]]
                lengths_B, last_B, keep_B = n_new_B + k - 1, n_new_B + k - 2, n_new_B
            if k <= self._depth:
                state = states[k - 1]
                mark = state.mark()
            depth = min(k, self._depth)
            hidden_BTD, logits_BV = self._predictor.draft(depth, given_BT, hidden_BTD, state, lengths_B, last_B)
            drafts.append(draw(logits_BV, _column(uniform_BN, self._n_drafts + k), self._sampling).clamp(min=0))
            if uniform_BN is not None:
                draft_p.append(probabilities(logits_BV, self._sampling))
            tokens_BT = tokens_BT.scatter(1, (n_new_B + k - 1)[:, None], drafts[-1][:, None])
            if k < self._depth:
                next_carried.append(at(hidden_BTD, keep_B - 1)[:, None])
            if k < self._depth or k == self._n_drafts:
                if k == 1:  # its tokens are known
                    state.release(mark)
                else:
                    state.rollback(mark, keep_B)
        self._drafts_BK.copy_(torch.stack(drafts, dim=1))
        if draft_p:
            draft_p_BKV = torch.stack(draft_p, dim=1)
            if self._draft_p_BKV is None:
                self._draft_p_BKV = draft_p_BKV
            self._draft_p_BKV.copy_(draft_p_BKV)
        return next_carried


def _column(uniform_BN: torch.Tensor | None, n: int) -> torch.Tensor | None:
    return None if uniform_BN is None else uniform_BN[:, n]
