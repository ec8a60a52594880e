"""Many clients at once, of which some go away: nobody gets another's text, and nothing is left behind."""

import asyncio
import socket
import time
from functools import partial

import openai
import pytest
import torch

from fusedlm.generation import generate
from fusedlm.serve.process import ProcessWorker
from tests.serve.engines import TOKENIZER, assert_nothing_is_left, make_engine, make_model, small_engine
from tests.serve.served import serving

N_CLIENTS = 200


def _prompt(i: int) -> str:
    shared = "A beginning that many prompts share, of several blocks. " if i % 2 else ""
    return f"{shared}Client {i % 40} asks" + " and asks" * (i % 7)


def _options(i: int) -> dict:
    return {"temperature": 0.0 if i % 3 else 0.8, "seed": i % 40, "max_tokens": 3 + i % 40 * 7 % 11}


async def _client(api, i: int, leaves: bool) -> str | None:
    """The text; None if this client goes away before the end."""
    options = _options(i)
    if i % 4 == 0 and not leaves:
        answer = await api.completions.create(model="small", prompt=_prompt(i), **options)
        return answer.choices[0].text
    text = ""
    async with await api.completions.create(model="small", prompt=_prompt(i), stream=True, **options) as stream:
        async for chunk in stream:
            text += chunk.choices[0].text
            if leaves:
                return None
    return text


async def _all(url: str) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120) as api:
        return await asyncio.gather(*(_client(api, i, i % 3 == 1) for i in range(N_CLIENTS)))


def _after(engine) -> dict:
    cache = engine.cache
    left = (len(engine.slots), engine.slots.nbytes(), engine.sequences(), engine.is_idle)
    return {"left": left, "hits": cache.hits, "evicted": cache.evicted, "bytes": cache.nbytes}


@pytest.mark.parametrize(
    ("worker", "device"),
    [("thread", "cpu"), ("process", "cpu"), pytest.param("process", "cuda", marks=pytest.mark.gpu)],
)
def test_two_hundred_clients_get_their_own_texts(worker, device):
    limits = {"sequences": 16, "waiting": N_CLIENTS, "cache_bytes": 200_000, "chunk": 64}
    engine = small_engine(device, **limits)
    expected: dict[tuple, str] = {}
    for i in range(N_CLIENTS):
        key = (_prompt(i), *_options(i).values())
        if i % 3 != 1 and key not in expected:
            temperature, seed, n = _options(i).values()
            options = {"temperature": temperature, "seed": seed, "max_tokens": n, "device": device}
            expected[key] = generate(engine.model, TOKENIZER, _prompt(i), dtype=torch.float32, **options)
    found = engine if worker == "thread" else ProcessWorker(partial(small_engine, device, **limits))
    with serving(found) as served:
        texts = asyncio.run(_all(served.url))
        served.wait_idle()
        after = served.server._service.worker.call(_after).result()
    wrong = [i for i, text in enumerate(texts) if i % 3 != 1 and text != expected[_prompt(i), *_options(i).values()]]
    assert wrong == []
    assert sum(text is None for text in texts) == len(range(1, N_CLIENTS, 3))
    slots, n_bytes, sequences, is_idle = after["left"]
    assert (slots, sequences, is_idle) == (0, [], True)
    assert n_bytes == 0 or device == "cuda"  # where memory and graphs are kept
    assert after["hits"] > 50 and after["evicted"] > 0
    assert after["bytes"] <= 200_000


def test_the_client_library_reads_every_answer():
    with serving(make_engine(make_model())) as served:
        api = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
        assert [model.id for model in api.models.list()] == ["small"]
        found = api.completions.create(model="small", prompt="ab", logprobs=2, n=2, max_tokens=4)
        assert len(found.choices) == 2 and found.choices[0].logprobs.token_logprobs
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            api.chat.completions.create(model="small", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError, match="'other' is not served"):
            api.completions.create(model="other", prompt="x")


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_goes_away_frees_its_slot(stream):
    engine = make_engine(make_model(), context=4096)
    with serving(engine) as served:
        body = f'{{"prompt": "x", "max_tokens": 4000, "ignore_eos": true, "stream": {stream}}}'.encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        client = socket.create_connection(("127.0.0.1", served.port))
        client.sendall(head + body)
        worker = served.server._service.worker
        while not worker.call(lambda engine: engine.metrics.generated_tokens).result():
            time.sleep(0.01)
        client.close()
        served.wait_idle()
        assert engine.metrics.cancelled == 1 and engine.metrics.generated_tokens < 4000
    assert_nothing_is_left(engine)


def _wait_running(served, n: int) -> None:
    while served.server._service.worker.call(lambda engine: len(engine.sequences())).result() < n:
        time.sleep(0.01)


def test_what_runs_at_the_end_of_the_server_may_finish():
    engine = make_engine(make_model(), context=1000)
    with serving(engine, grace=600) as served:

        async def run():
            async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as api:
                options = {"model": "small", "prompt": "x", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
                running = asyncio.ensure_future(api.completions.create(**options))
                await asyncio.to_thread(_wait_running, served, 1)
                served.server.should_exit = True
                return await running

        found = asyncio.run(run())
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 300
    assert_nothing_is_left(engine)


def test_what_does_not_finish_in_time_is_ended_in_order():
    engine = make_engine(make_model(), context=100_000)
    with serving(engine, grace=0) as served:

        async def read(stream):
            async for _ in stream:
                pass

        async def run():
            async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as api:
                options = {"model": "small", "prompt": "x", "max_tokens": 90_000, "extra_body": {"ignore_eos": True}}
                stream = await api.completions.create(stream=True, **options)
                tasks = asyncio.gather(api.completions.create(**options), read(stream), return_exceptions=True)
                await asyncio.to_thread(_wait_running, served, 2)
                served.server.should_exit = True
                return await tasks

        whole, streamed = asyncio.run(run())
    assert isinstance(whole, openai.InternalServerError) and whole.status_code == 503
    assert isinstance(streamed, openai.APIError) and "shut down before the end" in str(streamed)
    assert_nothing_is_left(engine)
