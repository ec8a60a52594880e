"""Requests to the engine and its answers; without HTTP."""

import itertools
from dataclasses import dataclass, field
from functools import cached_property

import torch

from fusedlm.generation.sampling import Sampling, check_sampling
from fusedlm.serve.text import SequenceText

_numbers = itertools.count()
_DRAWS = 64  # random numbers drawn at a time


class QueueFull(Exception):
    """The queue of waiting sequences has no room; try again later."""


@dataclass(frozen=True)
class Choosing:
    """How the tokens of a sequence are chosen.

    temperature, top_k, top_p: as `fusedlm.generation.next_token_probabilities`.
    presence_penalty, frequency_penalty: subtracted from the logit of a token that was generated before, once and once
        per occurrence; the prompt does not count.
    logit_bias: added to the logits of these ids.
    logprobs: so many of the most likely tokens are reported with each token, and its own log-probability; None: none.
        They are those of the model, before penalties, bias and temperature.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)

    @property
    def changes_logits(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)

    @cached_property
    def sampling(self) -> Sampling:
        top_p = None if self.top_p == 1 else self.top_p
        return Sampling(0, self.temperature, self.top_k, top_p)


@dataclass(frozen=True)
class ScoredToken:
    """A token with its log-probability, and those of the most likely ids, most likely first. logprob None: not asked
    for, or of a first token, before which there is nothing. start: characters of the text before it."""

    id: int
    start: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step gave a sequence.

    text: what can be released: complete characters, and nothing that a stop string may still claim.
    tokens: those whose text was released up to here, with `Choosing.logprobs`; all of them by the last piece.
    finish: "stop" (end of text or a stop string), "length", "error" or "shutdown" in the last piece; None: not yet.
    error: one line, with finish "error".
    """

    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    finish: str | None = None
    error: str | None = None


class Sequence:
    """One text that is generated.

    Args:
        ids: tokens to continue, at least one.
        choosing: of tokens.
        max_tokens: most tokens to generate, from 0.
        stop: texts that end it, which are not part of it.
        seed: of its own generator on the CPU, which gives one number for each token that is not the most likely one.
        score_prompt: report the log-probabilities of the prompt's tokens.
        ignore_eot: go on after end-of-text.
        group: sequences with the same prompt, which is read once.
        number: that of the same sequence in another process; None: a new one.
    """

    def __init__(
        self,
        tokenizer,
        ids: list[int],
        choosing: Choosing,
        *,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        score_prompt: bool = False,
        ignore_eot: bool = False,
        group: "Group | None" = None,
        number: int | None = None,
    ):
        self.number = next(_numbers) if number is None else number
        self.ids, self.choosing, self.max_tokens = ids, choosing, max_tokens
        self.stop, self.seed = stop, seed
        self.score_prompt, self.ignore_eot, self.group = score_prompt, ignore_eot, group
        self.text = SequenceText(tokenizer, ids, stop)
        self._generator: torch.Generator | None = None  # not made where another process draws
        self._uniform: list[float] = []  # drawn and not used yet, the next one last
        self.generated: list[int] = []
        self.n_generated = 0
        self.counts: dict[int, int] = {}
        self.prompt_scores: list[ScoredToken] = []
        self.cached_tokens = 0
        self.arrived = 0.0
        self.last_token_at: float | None = None

    def next_uniform(self) -> float:
        """The next number from 0 to 1 of its generator."""
        if not self._uniform:
            if self._generator is None:
                self._generator = torch.Generator().manual_seed(self.seed % 2**64)
            drawn = torch.rand(_DRAWS, generator=self._generator, dtype=torch.float64)
            self._uniform = drawn.flip(0).tolist()
        return self._uniform.pop()

    def count(self, token: int) -> None:
        self.generated.append(token)
        self.n_generated += 1
        self.counts[token] = self.counts.get(token, 0) + 1


class Group:
    """The choices of one prompt, of which the first reads it: its state and logits wait for the others.

    n_waiting: choices that have not got them.
    """

    def __init__(self, n_choices: int):
        self.n_waiting = n_choices
        self.row = self.logits_V = None
        self.prompt_scores: list[ScoredToken] = []
        self.is_reading = False

    def keep(self, row, logits_V, prompt_scores: list[ScoredToken]) -> None:
        self.row, self.logits_V, self.prompt_scores = row, logits_V, prompt_scores

    def take(self) -> None:
        """One choice less waits; the last one frees the state."""
        self.n_waiting -= 1
        if self.n_waiting == 0:
            self.row = self.logits_V = None
