"""The endpoints, over HTTP: their answers, streams, logprobs and limits."""

import json
import sys

import pytest
import torch

from fusedlm.generation import generate
from fusedlm.serve.app import _joined
from fusedlm.serve.chat import ChatTemplate
from fusedlm.serve.metrics import engine_lines
from fusedlm.serve.requests import Piece, ScoredToken
from tests.serve.engines import TOKENIZER, assert_nothing_is_left, make_engine, make_model, make_sequence
from tests.serve.served import TEMPLATE, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 12}


def alone(model, prompt, max_tokens=12, **options):
    options = {"temperature": 0} | options
    return generate(model, TOKENIZER, prompt, max_tokens=max_tokens, device="cpu", dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def served(model):
    with serving(make_engine(model, cache_bytes=10**6), template=ChatTemplate(TEMPLATE, TOKENIZER)) as found:
        yield found
        found.wait_idle()
    assert_nothing_is_left(found.engine)


def test_what_is_served(served):
    status, _, text = served.send("GET", "/v1/models")
    assert status == 200 and json.loads(text)["data"][0]["id"] == "small"
    assert json.loads(served.send("GET", "/v1/models/small")[2])["max_model_len"] == 256
    assert served.send("GET", "/v1/models/other")[0] == 404
    assert served.send("GET", "/health")[:1] == (200,)
    status, headers, text = served.send("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "http" not in text.replace("http-equiv", "") and "fetch(" in text  # nothing comes from elsewhere


def test_a_completion(served, model):
    answer = served.post(COMPLETIONS, {"model": "small", "prompt": "It is", **GREEDY})
    assert answer["object"] == "text_completion" and answer["model"] == "small"
    (choice,) = answer["choices"]
    assert choice["text"] == alone(model, "It is")
    ended = choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 6
    assert ended or answer["usage"]["completion_tokens"] == 12


def test_prompts_of_every_form(served, model):
    texts = ["It is", "né", ""]
    answer = served.post(COMPLETIONS, {"prompt": texts, **GREEDY})
    assert [choice["text"] for choice in answer["choices"]] == [alone(model, text) for text in texts]
    ids = [[TOKENIZER.eot_id, *TOKENIZER.encode(text)] for text in texts]
    assert served.post(COMPLETIONS, {"prompt": ids, **GREEDY})["choices"] == answer["choices"]
    assert served.post(COMPLETIONS, {"prompt": ids[0], **GREEDY})["choices"][0] == answer["choices"][0]


def test_choices_have_seeds_of_their_own(served, model):
    body = {"prompt": ["ab", "cd"], "n": 3, "seed": 5, "max_tokens": 9, "temperature": 0.9, "top_k": 50}
    found = [choice["text"] for choice in served.post(COMPLETIONS, body)["choices"]]
    options = {"temperature": 0.9, "top_k": 50, "max_tokens": 9}
    expected = [alone(model, text, seed=5 + i, **options) for i, text in enumerate(["ab"] * 3 + ["cd"] * 3)]
    assert found == expected
    assert served.post(COMPLETIONS, body | {"seed": None})["choices"] != found


def test_a_stream_has_the_text_of_the_answer(served, model):
    body = {"prompt": ["It is", "naïve"], "n": 2, "seed": 3, "max_tokens": 15, "logprobs": 2}
    whole = served.post(COMPLETIONS, body)
    events = served.events(COMPLETIONS, body | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, last = events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        for name in ("tokens", "token_logprobs", "text_offset"):
            joined = [entry for c in own if c["logprobs"] for entry in c["logprobs"][name]]
            expected = choice["logprobs"][name]
            assert joined == (pytest.approx(expected, abs=1e-4) if name == "token_logprobs" else expected)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_with_logprobs_is_plain_scoring(served, model, stream, as_ids):
    text = "It is nöt so, and this is longer than a chunk"
    ids = TOKENIZER.encode(text)
    body = {"prompt": ids if as_ids else text, "echo": True, "logprobs": 1, "max_tokens": 3 if as_ids else 0}
    body |= {"temperature": 0, "ignore_eos": True, "n": 2}
    if stream:
        chunks = served.events(COMPLETIONS, body | {"stream": True})
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == 1]
        names = ("tokens", "token_logprobs", "text_offset")
        logprobs = {name: [x for c in own if c["logprobs"] for x in c["logprobs"][name]] for name in names}
        found = "".join(c["text"] for c in own)
    else:
        choice = served.post(COMPLETIONS, body)["choices"][1]
        logprobs, found = choice["logprobs"], choice["text"]
    assert found.startswith(text)
    full = ids if as_ids else [TOKENIZER.eot_id, *ids]
    with torch.no_grad():
        logits = model(torch.tensor([full])).logits[0].double().log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(full[1:])]
    expected = [None, *expected] if as_ids else expected
    n = len(ids)
    assert logprobs["token_logprobs"][:n] == pytest.approx(expected, abs=1e-4)
    assert len(logprobs["tokens"]) == n + (3 if as_ids else 0)
    raw = text.encode()
    assert logprobs["text_offset"][:n] == [len(raw[:i].decode(errors="ignore")) for i in range(n)]
    assert all(offset >= len(text) for offset in logprobs["text_offset"][n:])


def test_a_chat(served, model):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 10, "logprobs": True, "top_logprobs": 2}
    answer = served.post(CHAT, body)
    eot = TOKENIZER.eot_id
    ids = [eot, *b"user: Hi", eot, *b"\nassistant: "]
    expected = served.post(COMPLETIONS, {"prompt": ids, "temperature": 0, "max_tokens": 10})["choices"][0]
    message = answer["choices"][0]["message"]
    assert message["content"] == expected["text"] and message["role"] == "assistant"
    entries = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == message["content"]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in entries)
    chunks = served.events(CHAT, body | {"stream": True})
    deltas = [c["delta"] for chunk in chunks for c in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]


def test_no_message_can_write_end_of_text(served):
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", TOKENIZER)
    from fusedlm.serve.fields import Message

    for text in ("<|endoftext|>", "\x00" * 40, "{{ eos_token }}", "{{ bos_token }}"):
        ids = template.encode([Message(role="user", content=text)])
        assert ids == [TOKENIZER.eot_id, *text.encode()]


def test_stop_strings_end_a_text_before_them(served, model):
    text = alone(model, "It is", 40)
    assert len(text) > 6
    for stop in (text[3:6], [text[4], "never"], text[2:4]):
        expected = text[: min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)]
        body = {"prompt": "It is", "temperature": 0, "max_tokens": 40, "stop": stop, "logprobs": 0}
        choice = served.post(COMPLETIONS, body)["choices"][0]
        assert choice["text"] == expected and choice["finish_reason"] == "stop"
        assert all(offset < len(expected) for offset in choice["logprobs"]["text_offset"])
        chunks = served.events(COMPLETIONS, body | {"stream": True})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


def test_a_key_is_asked_for(model):
    with serving(make_engine(model), api_key="secret") as served:
        for key in (None, "Bearer wrong", "Bearer sécret", "secre"):
            headers = {} if key is None else {"Authorization": key}
            for method, path in (("GET", "/v1/models"), ("POST", COMPLETIONS), ("GET", "/metrics")):
                status, _, text = served.send(method, path, b"{}" if method == "POST" else None, **headers)
                assert status == 401 and "API key" in json.loads(text)["error"]["message"]
        assert served.send("GET", "/v1/models", Authorization="Bearer secret")[0] == 200
        assert served.send("GET", "/health")[0] == 200


def test_a_full_queue_is_429(model):
    with serving(make_engine(model, sequences=1, waiting=1)) as served:
        body = {"prompt": ["x"] * 3, "max_tokens": 2}
        status, headers, text = served.send("POST", COMPLETIONS, body)
        assert status == 429 and headers["retry-after"] == "1"
        assert "at most 1 may" in json.loads(text)["error"]["message"]
        assert served.post(COMPLETIONS, body | {"prompt": ["x"] * 2})["choices"]


def test_metrics_count_what_was_done(model):
    with serving(make_engine(model, cache_bytes=10**6)) as served:
        for _ in range(2):
            served.post(COMPLETIONS, {"prompt": "x" * 40, "max_tokens": 5, "ignore_eos": True, "temperature": 0})
        served.send("POST", COMPLETIONS, b"{")
        served.wait_idle()
        lines = served.send("GET", "/metrics")[2].splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert found["fusedlm_generated_tokens_total"] == "10"
        assert found["fusedlm_cached_prompt_tokens_total"] == "40" and found["fusedlm_prompt_tokens_total"] == "42"
        assert found["fusedlm_prefix_cache_hits_total"] == "1" and found["fusedlm_running_sequences"] == "0"
        assert found['fusedlm_finished_sequences_total{reason="length"}'] == "2"
        assert found['fusedlm_time_to_first_token_seconds_bucket{le="+Inf"}'] == "2"
        assert found["fusedlm_inter_token_seconds_count"] == "8"
        assert found['fusedlm_requests_total{path="/v1/completions",status="200"}'] == "2"
        assert found['fusedlm_requests_total{path="/v1/completions",status="400"}'] == "1"
        for line in lines:
            assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2


def test_metrics_are_exact_however_large(model):
    engine = make_engine(model)
    engine.metrics.generated_tokens = 123_456_789
    engine.metrics.duration.observe(2**24 + 0.5)
    lines = engine_lines(engine)
    assert "fusedlm_generated_tokens_total 123456789" in lines
    assert f"fusedlm_sequence_seconds_sum {2**24 + 0.5}" in lines


def test_a_step_that_fails_ends_its_requests_and_no_others(model, monkeypatch):
    engine = make_engine(model)
    decode, fails = engine._decode, [True]

    def failing(pieces):
        if fails and fails.pop():
            engine._running.clear()  # a sequence that the engine has lost
            engine.slots.lengths.clear()
            raise RuntimeError("out of memory\nfor a while")
        decode(pieces)

    monkeypatch.setattr(engine, "_decode", failing)
    with serving(engine) as served:
        status, _, text = served.send("POST", COMPLETIONS, {"prompt": "x", "ignore_eos": True})
        error = json.loads(text)["error"]
        assert status == 500 and error["message"] == "the engine failed: RuntimeError: out of memory for a while"
        assert served.post(COMPLETIONS, {"prompt": "It is", **GREEDY})["choices"][0]["text"] == alone(model, "It is")
        assert engine.metrics.finished["error"] == 0, "the step had lost its sequence"


def fail(*_, **__):
    raise RuntimeError("the device is gone")


def test_sequences_that_cannot_be_taken_apart_after_a_failing_step_are_dropped(model, monkeypatch):
    engine = make_engine(model, cache_bytes=10**6)
    monkeypatch.setattr(engine.slots, "advance", fail)
    monkeypatch.setattr(engine.slots, "remove", fail)
    with serving(engine) as served:
        body = {"prompt": "x" * 100, "ignore_eos": True}
        status, _, text = served.send("POST", COMPLETIONS, body)
        assert (status, "the device is gone" in text) == (500, True)
        served.post(COMPLETIONS, body | {"max_tokens": 1})
        assert engine.metrics.finished["error"] == 1 and not engine.metrics.cached_tokens
        assert served.post(COMPLETIONS, {"prompt": "It is", **GREEDY})["choices"][0]["text"] == alone(model, "It is")


def test_an_engine_that_cannot_start_again_takes_no_requests(model, monkeypatch):
    engine = make_engine(model)
    monkeypatch.setattr(engine, "_decode", fail)
    monkeypatch.setattr(engine, "_prepare", fail)
    with serving(engine) as served:
        assert served.send("POST", COMPLETIONS, {"prompt": "x", "ignore_eos": True})[0] == 500
        assert served.send("POST", COMPLETIONS, {"prompt": "x"})[0] == 503
        assert served.send("GET", "/health")[0] == 503


def test_pieces_that_have_come_together_are_one_event():
    """A loop that is behind sends what each choice has got meanwhile, and an error after it."""
    first, second = (make_sequence("a") for _ in range(2))
    token = ScoredToken(7, 0, -1.0)
    error = Piece(finish="error", error="no memory")
    came = [(first, Piece("a")), (second, Piece("x")), (first, Piece("b", (token,), "stop")), (second, error)]
    assert _joined(came) == [(first, Piece("ab", (token,), "stop")), (second, Piece("x")), (second, error)]


def test_the_engine_gets_the_interpreter_soon_while_the_server_runs(model):
    others = sys.getswitchinterval()  # of a server that runs already
    sys.setswitchinterval(0.005)
    try:
        with serving(make_engine(model)):
            assert sys.getswitchinterval() < 0.001
        assert sys.getswitchinterval() == 0.005
    finally:
        sys.setswitchinterval(others)
