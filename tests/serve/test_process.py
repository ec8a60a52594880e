"""An engine in a process of its own answers as one in a thread does, and neither process outlives the other."""

import json
import os
import signal
import threading
import time
from functools import partial

import pytest

from fusedlm.generation import generate
from fusedlm.serve.process import ProcessWorker
from tests.serve.engines import TOKENIZER, small_engine
from tests.serve.served import TEMPLATE, serving

BODIES = [
    {"prompt": "We the", "max_tokens": 9, "temperature": 0},
    {"prompt": "We the", "max_tokens": 9, "seed": 3, "n": 3},
    {"prompt": ["ab", "cd"], "max_tokens": 3, "seed": 3, "n": 2, "logprobs": 2},
    {"prompt": "ab", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True, "n": 2},
    {"prompt": [70, 71], "max_tokens": 30, "seed": 1, "stop": ["e", "ab"], "logit_bias": {"101": 4}},
    {"prompt": "ab", "max_tokens": 8, "seed": 5, "presence_penalty": 1.0, "frequency_penalty": 0.5, "ignore_eos": True},
    {"prompt": "a long beginning that is shared " * 3, "max_tokens": 2, "temperature": 0},
    {"prompt": "a long beginning that is shared " * 3 + "twice", "max_tokens": 2, "temperature": 0},
    {"prompt": "a long beginning that is shared " * 3 + "again", "max_tokens": 2, "temperature": 0},
]


def _answers(served) -> list:
    found = [served.post("/v1/completions", body) for body in BODIES]
    for body in BODIES:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = served.events("/v1/completions", body | options)
        found += sorted(_joined(events).items())
    for answer in found:
        if isinstance(answer, dict):
            del answer["id"], answer["created"]
    return found


def _joined(events: list[dict]) -> dict:
    """By choice its text, log-probabilities and end, however they were cut into events; and the usage."""
    found = {"usage": events[-1]["usage"]}
    for event in events[:-1]:
        for choice in event["choices"]:
            own = found.setdefault(f"choice {choice['index']}", {"text": "", "logprobs": [], "end": None})
            own["text"] += choice["text"]
            own["logprobs"] += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
            own["end"] = choice["finish_reason"] or own["end"]
    return found


def test_answers_are_those_of_an_engine_in_a_thread():
    limits = {"cache_bytes": 2**20, "context": 256}
    with serving(small_engine(**limits)) as served:
        expected = _answers(served)
    with serving(ProcessWorker(partial(small_engine, **limits))) as served:
        assert _answers(served) == expected
    usages = [answer["usage"] for answer in expected if isinstance(answer, dict)]
    assert usages[-1]["prompt_tokens_details"]["cached_tokens"] > 0 and usages[1]["completion_tokens"] > 9
    assert expected[0]["choices"][0]["text"] == generate(
        small_engine().model, TOKENIZER, "We the", max_tokens=9, temperature=0.0, device="cpu"
    )


def _sizes(engine) -> tuple[int, int, int]:
    return engine.n_running, engine.metrics.cancelled, engine.metrics.generated_tokens


def _endless(stream: bool) -> dict:
    return {"prompt": "x", "max_tokens": 90_000, "ignore_eos": True, "stream": stream}


def test_a_client_that_goes_away_frees_its_slot():
    from http.client import HTTPConnection

    worker = ProcessWorker(partial(small_engine, context=100_000))
    with serving(worker) as served:
        connection = HTTPConnection("127.0.0.1", served.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(_endless(stream=True)))
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        assert worker.call(_sizes).result()[:2] == (1, 0)
        answer.close()
        connection.close()
        served.wait_idle()
        running, cancelled, generated = worker.call(_sizes).result()
        assert (running, cancelled) == (0, 1) and generated < 90_000


def test_refusals_and_metrics_come_back():
    worker = ProcessWorker(partial(small_engine, context=100_000, sequences=1, waiting=0))
    with serving(worker, template=None, grace=0) as served:
        done = threading.Thread(target=served.send, args=("POST", "/v1/completions", _endless(stream=False)))
        done.start()
        while not worker.call(_sizes).result()[0]:
            time.sleep(0.01)
        status, headers, _ = served.send("POST", "/v1/completions", {"prompt": "y"})
        assert status == 429 and headers["retry-after"]
        status, _, text = served.send("GET", "/metrics")
        assert status == 200 and "fusedlm_running_sequences 1\n" in text
        with pytest.raises(ZeroDivisionError):
            worker.call(_failing).result()
        with pytest.raises(RuntimeError, match="pickle"):
            worker.call(_unsendable).result()
    done.join()  # ended with the server
    assert worker._process.exitcode == 0


def _failing(engine) -> float:
    return 1 / 0


def _unsendable(engine):
    return lambda: engine


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_process_is_killed_nobody_waits(stream):
    worker = ProcessWorker(partial(small_engine, context=100_000))
    with serving(worker) as served:
        found = []
        client = threading.Thread(
            target=lambda: found.append(served.send("POST", "/v1/completions", _endless(stream=stream)))
        )
        client.start()
        while not worker.call(_sizes).result()[2]:
            time.sleep(0.01)
        os.kill(worker._process.pid, signal.SIGKILL)
        client.join()
        status, _, text = found[0]
        assert status == (200 if stream else 500) and "the engine's process has ended" in text
        assert served.send("GET", "/health")[0] == 503
        assert served.send("POST", "/v1/completions", {"prompt": "y"})[0] == 503


def _refuses() -> None:
    raise ValueError("runs/x holds no run")


def _dies() -> None:
    os._exit(3)


def test_an_engine_that_cannot_be_built():
    with pytest.raises(ValueError, match="^runs/x holds no run$"):
        ProcessWorker(_refuses)
    with pytest.raises(ValueError, match="ended with status 3 before it had a model"):
        ProcessWorker(_dies)


def test_templates_use_the_tokenizer_of_the_engine():
    from fusedlm.serve.chat import ChatTemplate

    worker = ProcessWorker(small_engine)
    with serving(worker, template=ChatTemplate(TEMPLATE, worker.facts.tokenizer)) as served:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0}
        assert served.post("/v1/chat/completions", body)["usage"]["completion_tokens"] == 5
