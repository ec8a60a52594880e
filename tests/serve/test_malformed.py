"""Requests that are not right: always a status of 4xx and one line, and the server continues."""

import json
import random

import pytest

from fusedlm.serve.chat import ChatTemplate
from tests.serve.engines import TOKENIZER, make_engine, make_model
from tests.serve.served import TEMPLATE, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ODD = [
    None, True, False, -1, 0, 1.5, 1e308, 10**30, -(2**70), "", "x", "\ud800", "a\x00b", [], [[]], [None], [True],
    [-1], [300], [256.0], [[1, "x"]], ["x", 1], [["x"]], {}, {"a": 1}, [{}], "x" * 5000, [1] * 5000,
]  # fmt: skip
KEYS = [
    "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options", "stop", "logprobs",
    "presence_penalty", "frequency_penalty", "logit_bias", "seed", "echo", "best_of", "suffix", "model", "ignore_eos",
]  # fmt: skip
CHAT_KEYS = ["messages", "max_completion_tokens", "top_logprobs", "tools", "response_format", *KEYS[1:9]]
RAW = [
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": "x", "temperature": 1e999}',
    b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "x" "n": 1}', b"{'prompt': 'x'}", b'{"prompt": "\\ud83d"}',
    b'{"prompt": "x", "stop": ["\\udc00"]}', b'{"prompt": "x"}' * 2, b"\x00" * 10, b'{"prompt": "x", "": 1}',
]  # fmt: skip
BIASES = [{"x": 1}, {"-1": 1}, {"300": 1}, {"1": "x"}, {"1": 1000}, {"99999999999": 1}, {"1": None}]


@pytest.fixture(scope="module")
def served():
    engine = make_engine(make_model(), context=64)
    with serving(engine, template=ChatTemplate(TEMPLATE, TOKENIZER), max_body=400_000) as found:
        yield found


def _check(served, method, path, body) -> int:
    status, headers, text = served.send(method, path, body)
    assert status < 500, (path, body, text)
    if status >= 400:
        error = json.loads(text)["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 400
        assert error["message"].isprintable() and "Traceback" not in text
    return status


def _bodies():
    """Some five hundred: each odd value in each key, more keys at random, and bodies that are no JSON object."""
    generator = random.Random(1)
    for key in KEYS:
        for value in ODD:
            yield COMPLETIONS, {"prompt": "x", "max_tokens": 1, key: value}
    for key in CHAT_KEYS:
        for value in generator.sample(ODD, 8):
            yield CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, key: value}
    for bias in BIASES:
        yield COMPLETIONS, {"prompt": "x", "logit_bias": bias}
    for message in ODD:
        yield CHAT, {"messages": [message]}
        yield CHAT, {"messages": [{"role": "user", "content": message}]}
    for key in ("promt", "temprature", "", "\ud800", "__proto__"):
        yield COMPLETIONS, {"prompt": "x", key: 1}
    for raw in RAW:
        yield COMPLETIONS, raw
        yield CHAT, raw


def test_malformed_requests_are_refused_in_one_line(served):
    bodies = list(_bodies())
    assert len(bodies) >= 500
    statuses = [_check(served, "POST", path, body) for path, body in bodies]
    refused = sum(400 <= status < 500 for status in statuses)
    assert refused > 0.6 * len(bodies)
    assert all(400 <= status < 500 for (_, body), status in zip(bodies, statuses, strict=True) if body in RAW)
    assert served.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1})["choices"]


def test_paths_methods_and_sizes(served):
    wrong = (("GET", COMPLETIONS), ("POST", "/health"), ("GET", "/v1/none"), ("DELETE", "/"), ("GET", "/%ff"))
    for method, path in wrong:
        assert _check(served, method, path, None) in (404, 405)
    status, _, text = served.send("POST", COMPLETIONS, b" " * 400_001)
    assert status == 413 and "more than 400000 bytes" in text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x" * 100}, "more than the context of 64 tokens"),
        ({"prompt": "x", "max_tokens": 63}, "max_tokens=63 is more than the context"),
        ({"prompt": "x", "temperature": -1}, "temperature=-1: Input should be greater than or equal to 0"),
        ({"prompt": "x", "temperatur": 1}, "temperatur: unknown key"),
        ({"prompt": [1, 257]}, "token id 257 is not in the vocabulary"),
        ({"prompt": "x", "stop": ""}, "stop=''"),
        ({"prompt": "x", "n": 129}, "n=129"),
        ({"prompt": ["x"] * 3, "n": 100}, "at most 256 choices"),
        ({"prompt": "x", "best_of": 2}, "best_of=2: must be n"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "needs stream=true"),
        ({}, "prompt=None: must be a string"),
        ({"prompt": "x", "max_tokens": 0}, "at least 1, or set echo"),
    ],
)
def test_what_is_said(served, body, said):
    status, _, text = served.send("POST", COMPLETIONS, body)
    assert status == 400 and said in json.loads(text)["error"]["message"]


def test_the_default_of_max_tokens_is_what_fits(served):
    body = {"prompt": "x" * 60, "ignore_eos": True}
    assert served.post(COMPLETIONS, body)["usage"]["completion_tokens"] == 3
