"""The bodies of requests: which keys they have and which values these take."""

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fusedlm.serve.errors import RequestError, shown

_MOST_STOPS, _LONGEST_STOP = 16, 1000
_MOST_BIASES = 1024


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a non-empty string or a list of them")
    if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
        raise ValueError(f"must be at most {_MOST_STOPS} strings of at most {_LONGEST_STOP} characters")
    for text in texts:
        check_text(text)
    return texts


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > _MOST_BIASES:
        raise ValueError(f"must be an object of at most {_MOST_BIASES} token ids with numbers")
    found = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 9):
            raise ValueError(f"{shown(name)} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias {shown(bias)} of token {name} must be a number from -100 to 100")
        found[int(name)] = float(bias)
    return found


def check_text(text: str) -> str:
    """Raises ValueError if a text has lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: lone surrogate at character {error.start}") from None
    return text


Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class Body(BaseModel):
    """Keys of both kinds of requests. Those of the last block are taken and have no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(max_length=500)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_texts)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    ignore_eos: bool | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class CompletionBody(Body):
    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[str, Field(max_length=64)]
    content: Any = None
    name: Annotated[str, Field(max_length=64)] | None = None


class ChatBody(Body):
    messages: list[Message]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    modalities: Any = None
    reasoning_effort: Any = None


B = TypeVar("B", bound=BaseModel)


def parse_json(raw: bytes) -> Any:
    """Raises RequestError if the body is not JSON."""

    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def parse_body(raw: bytes, kind: type[B]) -> B:
    """Raises RequestError with the first thing that is wrong."""
    tree = parse_json(raw)
    if not isinstance(tree, dict):
        raise RequestError(f"the body is {shown(tree)}; it must be a JSON object")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{place}: unknown key; leave it out", param=place) from None
        if first["type"] == "missing":
            raise RequestError(f"{place}: this key is required", param=place) from None
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{place}={shown(first['input'])}: {message}", param=place) from None
