"""Answers in the form of OpenAI's: whole ones, and the chunks of streams."""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fusedlm.serve.jobs import Job
from fusedlm.serve.requests import Piece, ScoredToken
from fusedlm.serve.text import SequenceText, token_text


@dataclass
class Choice:
    """What one choice has given so far."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish: str | None = None


class Writer:
    """Writes the answer to one job."""

    def __init__(self, job: Job, tokenizer, name: str):
        self._job, self._tokenizer, self._name = job, tokenizer, name
        prefix = "chatcmpl" if job.is_chat else "cmpl"
        self._id, self._created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self._lengths = [0] * len(job.sequences)  # characters of the prompts that are returned

    def whole(self, choices: list[Choice]) -> dict:
        """The answer without streaming."""
        entries = []
        for index, choice in enumerate(choices):
            text, tokens = self._prompt(index)
            text, tokens = text + choice.text, tokens + self._after_prompt(index, choice.tokens)
            entry = {"index": index, "finish_reason": choice.finish, "logprobs": self._logprobs(index, tokens)}
            entries.append(entry | self._content("message", text))
        kind = "chat.completion" if self._job.is_chat else "text_completion"
        return self._head(kind) | {"choices": entries, "usage": self._job.usage()}

    def first_chunks(self) -> list[dict]:
        """What a stream says before the first token: the role, or the prompt if it is returned."""
        chunks = []
        for index in range(len(self._job.sequences)):
            if self._job.is_chat:
                delta = {"role": "assistant", "content": ""}
                chunks.append(self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}))
            elif not self._job.sequences[index].score_prompt:
                text, _ = self._prompt(index)
                if text:
                    entry = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
                    chunks.append(self._chunk(entry))
        return chunks

    def chunk(self, index: int, piece: Piece, is_first: bool) -> dict | None:
        """Of one piece; None: it has nothing to say."""
        text, tokens = "", []
        if is_first and self._job.sequences[index].score_prompt:
            text, tokens = self._prompt(index)
        text, tokens = text + piece.text, tokens + self._after_prompt(index, piece.tokens)
        if not (text or tokens or piece.finish):
            return None
        entry = {"index": index, "finish_reason": piece.finish}
        entry["logprobs"] = self._logprobs(index, tokens) if tokens else None
        return self._chunk(entry | self._content("delta", text))

    def usage_chunk(self) -> dict:
        return self._chunk(None) | {"usage": self._job.usage()}

    def _head(self, kind: str) -> dict:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def _chunk(self, entry: dict | None) -> dict:
        kind = "chat.completion.chunk" if self._job.is_chat else "text_completion"
        usage = {"usage": None} if self._job.include_usage else {}
        return self._head(kind) | {"choices": [] if entry is None else [entry]} | usage

    def _content(self, name: str, text: str) -> dict:
        if not self._job.is_chat:
            return {"text": text}
        if name == "message":
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {"content": text} if text else {}}

    def _prompt(self, index: int) -> tuple[str, list[ScoredToken]]:
        """Text and tokens of a prompt that is returned, before those of the continuation."""
        own, sequence = self._job.prompts[index], self._job.sequences[index]
        if own is None:
            return "", []
        stream, starts, text = SequenceText(self._tokenizer, []), [], ""
        for token in own:
            starts.append(stream.n_decoded)
            text += stream.add(token)
        text += stream.finish()
        self._lengths[index] = len(text)
        if not sequence.score_prompt:
            return text, []
        scores = sequence.prompt_scores
        if len(scores) < len(own):  # nothing comes before the first one; before text there is end-of-text
            scores = [ScoredToken(own[0], 0), *scores]
        return text, [replace(token, start=start) for token, start in zip(scores, starts, strict=True)]

    def _after_prompt(self, index: int, tokens: Iterable[ScoredToken]) -> list[ScoredToken]:
        n = self._lengths[index]
        return list(tokens) if n == 0 else [replace(token, start=token.start + n) for token in tokens]

    def _logprobs(self, index: int, tokens: list[ScoredToken]) -> dict | None:
        if not self._job.logprobs:
            return None
        text_of = self._text_of
        if self._job.is_chat:
            return {"content": [self._chat_logprob(token) for token in tokens]}
        n_top = self._job.sequences[index].choosing.logprobs
        tops = [None if t.logprob is None else {text_of(i): p for i, p in reversed(t.top)} for t in tokens]
        return {
            "tokens": [text_of(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops if n_top else None,
            "text_offset": [token.start for token in tokens],
        }

    def _chat_logprob(self, token: ScoredToken) -> dict:
        top = [self._entry(i, p) for i, p in token.top]
        return self._entry(token.id, token.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict:
        raw = list(self._tokenizer.decode_bytes([token]))
        return {"token": self._text_of(token), "logprob": logprob, "bytes": raw}

    def _text_of(self, token: int) -> str:
        return token_text(self._tokenizer, token)
