"""From the body of a request to sequences of the engine."""

import secrets
from dataclasses import dataclass

from fusedlm.serve.chat import ChatTemplate
from fusedlm.serve.errors import RequestError, shown
from fusedlm.serve.fields import Body, ChatBody, CompletionBody, check_text
from fusedlm.serve.requests import Choosing, Group, Sequence

_MOST_CHOICES = 256  # of one request: prompts times n
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it


@dataclass
class Job:
    """One request.

    sequences: its choices, in order. prompts: of each choice, the ids that it returns before the continuation; None:
    not returned. is_chat: which kind of answer.
    """

    sequences: list[Sequence]
    prompts: list[list[int] | None]
    is_chat: bool
    stream: bool
    include_usage: bool
    logprobs: bool
    n_prompt_tokens: int

    def usage(self) -> dict:
        generated = sum(sequence.n_generated for sequence in self.sequences)
        firsts = {id(sequence.group): sequence for sequence in reversed(self.sequences)}.values()
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.n_prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in firsts)},
        }


class JobMaker:
    """Checks what the body alone cannot tell: ids, lengths, the name of the model."""

    def __init__(self, tokenizer, vocab_size: int, context: int, name: str, template: ChatTemplate | None):
        """vocab_size: of the model. context: most tokens of a prompt with its continuation. name: of the model."""
        self._tokenizer, self._context, self._name, self._template = tokenizer, context, name, template
        self._vocab_size = min(vocab_size, tokenizer.vocab_size)
        self._unused = set(tokenizer.unused_ids(self._vocab_size).tolist())

    def completion(self, body: CompletionBody) -> Job:
        """Raises RequestError if the request cannot be served."""
        self._check_name(body.model)
        if body.suffix:
            raise RequestError("suffix: text cannot be inserted; leave it out", param="suffix")
        if body.best_of not in (None, body.n or 1):
            raise RequestError(f"best_of={body.best_of}: must be n, or left out", param="best_of")
        prompts, returned = self._prompts(body.prompt)
        if not body.echo:
            returned = [None] * len(prompts)
        score = bool(body.echo) and body.logprobs is not None
        if body.max_tokens == 0 and not body.echo:
            raise RequestError("max_tokens=0: must be at least 1, or set echo", param="max_tokens")
        return self._job(body, prompts, returned, body.max_tokens, _DEFAULT_TOKENS, body.logprobs, score, is_chat=False)

    def chat(self, body: ChatBody) -> Job:
        """Raises RequestError if the request cannot be served."""
        self._check_name(body.model)
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                code="no_chat_template",
            )
        for name in ("tools", "response_format", "modalities"):
            value = getattr(body, name)
            if value and value not in ({"type": "text"}, ["text"]):
                raise RequestError(f"{name}={shown(value)}: not supported; leave it out", param=name)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if given == 0:
            raise RequestError("max_tokens=0: must be at least 1", param="max_tokens")
        n_top = (body.top_logprobs or 0) if body.logprobs else None
        return self._job(
            body, [self._template.encode(body.messages)], [None], given, self._context, n_top, False, is_chat=True
        )

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self._name):
            message = f"model={shown(name)} is not served; use {self._name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def _prompts(self, prompt) -> tuple[list[list[int]], list[list[int]]]:
        """The ids to continue, and those of the prompt as it was given."""
        if isinstance(prompt, str):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise RequestError(
                f"prompt={shown(prompt)}: must be a string, a list of strings, a list of token ids or a list of these",
                param="prompt",
            )
        if all(_is_id(entry) for entry in prompt):
            prompt = [prompt]
        if len(prompt) > _MOST_CHOICES:
            raise RequestError(f"{len(prompt)} prompts: at most {_MOST_CHOICES} are taken", param="prompt")
        found = [self._ids(entry, i) for i, entry in enumerate(prompt)]
        eot = self._tokenizer.eot_id
        # Text follows end-of-text, as every training document; ids are taken as they are.
        ids = [
            [eot, *own] if isinstance(entry, str) or not own else own for entry, own in zip(prompt, found, strict=True)
        ]
        return ids, found

    def _ids(self, entry, index: int) -> list[int]:
        if isinstance(entry, str):
            try:
                return self._tokenizer.encode(check_text(entry))
            except ValueError as error:
                raise RequestError(f"prompt {index}: {error}", param="prompt") from None
        if not isinstance(entry, list) or not all(_is_id(token) for token in entry):
            raise RequestError(f"prompt {index}={shown(entry)}: must be a string or token ids", param="prompt")
        for token in entry:
            self._check_id(token, "prompt")
        return entry

    def _check_id(self, token: int, param: str) -> None:
        if not 0 <= token < self._vocab_size or token in self._unused:
            raise RequestError(
                f"{param}: token id {token} is not in the vocabulary of {self._vocab_size}", param=param
            )

    def _job(
        self, body: Body, prompts, returned, max_tokens, default: int, n_top: int | None, score: bool, *, is_chat: bool
    ) -> Job:
        n, longest = body.n or 1, max(map(len, prompts))
        if n * len(prompts) > _MOST_CHOICES:
            raise RequestError(f"n={n} of {len(prompts)} prompts: at most {_MOST_CHOICES} choices are taken", param="n")
        room = self._context - longest
        if room < (1 if max_tokens is None else max_tokens):
            wanted = "" if max_tokens is None else f" and max_tokens={max_tokens}"
            raise RequestError(
                f"a prompt of {longest} tokens{wanted} is more than the context of {self._context} tokens",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        for token in body.logit_bias or ():
            self._check_id(token, "logit_bias")
        choosing = Choosing(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or None,
            top_p=body.top_p,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=body.logit_bias or {},
            logprobs=n_top,
        )
        seed = secrets.randbits(63) if body.seed is None else body.seed
        sequences, shown_prompts = [], []
        for ids, own in zip(prompts, returned, strict=True):
            group = Group(n)
            for _ in range(n):
                sequences.append(
                    Sequence(
                        self._tokenizer,
                        ids,
                        choosing,
                        max_tokens=min(default, room) if max_tokens is None else max_tokens,
                        stop=tuple(body.stop or ()),
                        seed=seed + len(sequences),
                        score_prompt=score,
                        ignore_eot=bool(body.ignore_eos),
                        group=group,
                    )
                )
                shown_prompts.append(own)
        options = body.stream_options
        return Job(
            sequences,
            shown_prompts,
            is_chat,
            bool(body.stream),
            options is not None and bool(options.include_usage),
            n_top is not None,
            sum(map(len, prompts)),
        )


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
