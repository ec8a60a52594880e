"""Prompts of chats, by a template in the language of Jinja as Transformers stores them."""

import secrets
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusedlm.serve.errors import RequestError
from fusedlm.serve.fields import Message, check_text

TEMPLATE_FILE = "chat_template.jinja"  # in a run folder
_ROLES = ("system", "developer", "user", "assistant", "tool")
_LONGEST = 2**24  # characters of a prompt


class ChatTemplate:
    """Messages to the tokens of a prompt.

    The template reads `messages`, `add_generation_prompt`, `bos_token` and `eos_token`, and runs in a sandbox that
    reaches neither files nor attributes of Python. Where it writes one of the two tokens, the prompt has end-of-text;
    no text of a message can do that, whatever characters it has.
    """

    def __init__(self, source: str, tokenizer):
        """Raises ValueError if the template is not valid."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        self._tokenizer = tokenizer

    def encode(self, messages: list[Message]) -> list[int]:
        """Ids of the prompt, end-of-text first.

        Raises:
            RequestError: a message is not of this form, or the template refuses the messages.
        """
        plain = [_plain(message, f"messages.{i}") for i, message in enumerate(messages)]
        if not plain:
            raise RequestError("messages=[]: give at least one message", param="messages")
        mark = f"\x00{secrets.token_hex(16)}\x00"
        try:
            text = self._template.render(
                messages=plain, add_generation_prompt=True, bos_token=mark, eos_token=mark, tools=None
            )
        except RequestError:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError(f"the chat template does not take these messages: {error}", param="messages") from None
        if len(text) > _LONGEST:
            raise RequestError(f"the prompt has {len(text)} characters; at most {_LONGEST} are taken", param="messages")
        ids = []
        for i, part in enumerate(text.split(mark)):
            ids += ([self._tokenizer.eot_id] if i else []) + (self._tokenizer.encode(part) if part else [])
        return ids if ids[:1] == [self._tokenizer.eot_id] else [self._tokenizer.eot_id, *ids]


def read_template(run: Path, path: Path | None, tokenizer) -> ChatTemplate | None:
    """The template of a file, or of the run folder; None: there is none.

    Raises:
        ValueError: it cannot be read or is not valid.
    """
    found = run / TEMPLATE_FILE if path is None else path.expanduser()
    if path is None and not found.exists():
        return None
    try:
        source = found.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"chat template {found}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {found}: byte {error.start} is not UTF-8") from None
    try:
        return ChatTemplate(source, tokenizer)
    except ValueError as error:
        raise ValueError(f"chat template {found}: {error}") from None


def _plain(message: Message, where: str) -> dict:
    if message.role not in _ROLES:
        raise RequestError(f"{where}.role={message.role!r}: must be one of {', '.join(_ROLES)}", param="messages")
    content = message.content
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and set(part) == {"type", "text"}]
        is_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(texts) if is_text else None
    if not isinstance(content, str):
        raise RequestError(f"{where}.content: must be a text, or a list of parts of type text", param="messages")
    try:
        check_text(content)
    except ValueError as error:
        raise RequestError(f"{where}.content: {error}", param="messages") from None
    return {"role": message.role, "content": content} | ({"name": message.name} if message.name else {})


def _refuse(message: str):
    raise RequestError(f"the chat template refuses these messages: {message}", param="messages")
