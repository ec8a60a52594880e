"""Short pieces of prompts in a static state of their own."""

import pytest
import torch

from fusedlm.serve import Choosing, Engine, Limits
from fusedlm.serve.prompt_steps import PromptSteps
from fusedlm.serve.worker import ThreadWorker
from tests.serve.engines import GREEDY, TOKENIZER, make_engine, make_model, make_sequence, run

MIXERS = {
    "attention": "{type: attention, n_heads: 2}",
    "window": "{type: attention, n_heads: 2, window: 12}",
    "mla": "{type: mla, n_heads: 2, kv_rank: 8, rope_dim: 4}",
    "diff_mla": "{type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}",
    "cmd_mla": "{type: cmd_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}",
    "gdn": "{type: gdn, n_heads: 2, chunk_size: 8}",
    "sdla": "{type: sdla, n_heads: 2}",
    "mamba2": "{type: mamba2, n_heads: 2}",
}
SHARED = "hello world, this is"
PROMPTS = ["a", SHARED, SHARED + " read again", "b" * 30, SHARED + " and again, and longer than the others"]


def _engine(model, reads_short: bool, **limits) -> Engine:
    """On the CPU, where pieces are read like this for tests alone: without graphs."""
    engine = make_engine(model, **({"chunk": 64, "cache_bytes": 2**24} | limits))
    if reads_short:
        engine._short.reason, engine._short._free_bytes = None, lambda: 2**40
    return engine


def _results(engine: Engine, scores: int | None = None) -> list:
    """Of prompts that are read together, of prompts whose beginnings are in the cache then, and of one more."""
    run(engine, [make_sequence("first")])
    choosing = Choosing(temperature=0.0, logprobs=scores)
    found = [run(engine, [make_sequence(text, choosing) for text in PROMPTS]) for _ in range(2)]
    return [*found[0], *found[1], *run(engine, [make_sequence("a" * 70, choosing)])]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cache_bytes", [0, 2**24])
def test_texts_and_scores_are_those_of_other_prompts(mixer, cache_bytes):
    model = make_model(MIXERS[mixer])
    plain, short = (_engine(model, reads_short, cache_bytes=cache_bytes) for reads_short in (False, True))
    expected, found = _results(plain, 2), _results(short, 2)
    assert [result.text for result in found] == [result.text for result in expected]
    for one, other in zip(found, expected, strict=True):
        logprobs = [torch.tensor([token.logprob for token in result.tokens]) for result in (one, other)]
        assert torch.allclose(*logprobs, atol=2e-5)
    assert short.metrics.cached_tokens == plain.metrics.cached_tokens
    assert short.metrics.prompt_tokens == plain.metrics.prompt_tokens
    read = sum(short._short._warm.values())
    assert read > 4, "pieces read in the static state"
    assert not plain._short._warm


def test_prompts_that_want_scores_are_read_in_chunks():
    model = make_model()
    engine = _engine(model, True)
    run(engine, [make_sequence("first")])
    choosing = Choosing(temperature=0.0, logprobs=1)
    (found,) = run(engine, [make_sequence(SHARED, choosing, score_prompt=True)])
    assert found.text and not engine._short._warm


def test_sizes_that_fit():
    model = make_model()
    steps = PromptSteps(_engine(model, False)._prefill._predictor, 100, lambda: 2**40)
    assert "CUDA device" in steps.reason and not steps.fits(1, 1)
    steps.reason = None
    assert steps.fits(1, 256) and steps.fits(16, 256) and not steps.fits(17, 1) and not steps.fits(1, 257)
    long = PromptSteps(steps._predictor, 2**16, lambda: 2**40)
    long.reason = None
    assert long.fits(1, 32) and not long.fits(2, 32) and not long.fits(1, 64), "all the room is attended to"
    off = PromptSteps(steps._predictor, 100, lambda: 2**40, cuda_graph=False)
    assert off.reason == "switched off"


def test_without_memory_prompts_are_read_in_chunks():
    model = make_model()
    engine, plain = _engine(model, True), _engine(model, False)
    engine._short._free_bytes = lambda: 1000
    assert [r.text for r in _results(engine)] == [r.text for r in _results(plain)]
    assert "does not fit into the memory" in engine._short.reason and engine._short.state is None


def test_few_rows_where_memory_is_scarce():
    model = make_model()
    engine, plain = _engine(model, True), _engine(model, False)
    row = _engine(model, True)
    _results(row)
    engine._short._free_bytes = lambda: row._short.state.nbytes() // 3
    assert [r.text for r in _results(engine)] == [r.text for r in _results(plain)]
    assert engine._short._sizes == [1, 4] and {n for n, _ in engine._short._warm} == {1, 4}


def test_other_weights_are_used_at_once():
    model = make_model()
    engine = _engine(model, True)
    _results(engine)
    with torch.no_grad():
        model.head.weight.mul_(-1)
    engine.submit([])
    engine._short.reason, engine._short._free_bytes = None, lambda: 2**40
    assert [r.text for r in _results(engine)] == [r.text for r in _results(_engine(model, False))]


def test_all_sizes_are_warmed_up_and_nothing_is_left():
    model = make_model()
    engine, plain = _engine(model, True), _engine(model, False)
    engine.warm_up()
    sizes = {(n, width) for n in (1, 4, 16) for width in (32, 64, 128, 256)}
    assert set(engine._short._warm) == {size for size in sizes if engine._short.fits(*size)}
    assert set(engine._short._warm.values()) == {3} and engine.is_idle
    assert [r.text for r in _results(engine)] == [r.text for r in _results(plain)]
    plain.warm_up()
    assert not plain._short._warm and plain.slots.state is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_worker_warms_up_first(fails):
    engine, calls = make_engine(make_model()), []

    def warm_up():
        calls.append(1)
        if fails:
            raise RuntimeError("no memory")

    engine.warm_up = warm_up
    worker = ThreadWorker(engine)
    worker.start()
    assert worker.call(lambda engine: engine.is_idle).result(timeout=20) and calls == [1]
    worker.stop()


@pytest.mark.gpu
def test_graphs_are_captured_before_the_first_request():
    model = make_model().cuda()
    limits = Limits(context=256, sequences=8, chunk=64, cache_bytes=2**24, block_size=8)
    engine = Engine(model, TOKENIZER, limits, device=torch.device("cuda"), dtype=torch.float32)
    engine.warm_up()
    prompts, steps = engine.graphed_prompts, engine.graphed_steps
    assert prompts and steps and engine.is_idle and not len(engine.slots)
    (found,) = run(engine, [make_sequence(SHARED)])
    assert engine.graphed_prompts > prompts and engine.graphed_steps == steps + len(found.pieces) - 1


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_graphs_give_what_chunks_give(mixer):
    model = make_model(MIXERS[mixer]).cuda()
    limits = Limits(context=256, sequences=8, chunk=64, cache_bytes=2**24, block_size=8)

    def results(cuda_graph):
        engine = Engine(
            model, TOKENIZER, limits, device=torch.device("cuda"), dtype=torch.float32, cuda_graph=cuda_graph
        )
        found = []
        for _ in range(4):
            engine.cache.clear()
            run(engine, [make_sequence("first")])
            for size in (1, 4):
                found += run(engine, [make_sequence(text, GREEDY) for text in PROMPTS[:size]])
        return [result.text for result in found], engine

    (expected, plain), (found, graphed) = results(False), results(None)
    assert found == expected
    assert graphed.graphed_prompts > 0 and graphed._short.reason is None
    assert plain.graphed_prompts == 0
