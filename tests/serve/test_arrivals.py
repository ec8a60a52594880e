"""Thousands of arrivals in virtual time, with cancellations and full queues: nothing is left behind."""

import random

import pytest

from fusedlm.serve import Choosing, Group, QueueFull
from fusedlm.testing import part_model, randomise_
from tests.serve.engines import TOKENIZER, assert_nothing_is_left, collect, make_engine, make_sequence

STEP_SECONDS = 0.02


def _model(mixer):
    model = part_model(mixer, "{type: swiglu, hidden: 16}", vocab_size=TOKENIZER.vocab_size)
    del model.blocks[1:]
    return randomise_(model, scale=0.3).eval()


@pytest.mark.parametrize(
    ("mixer", "cache_bytes"),
    [("{type: gdn, n_heads: 1, conv_size: 2}", 20_000), ("{type: mla, n_heads: 1, kv_rank: 8}", 6_000)],
)
def test_thousands_of_arrivals_leave_nothing(mixer, cache_bytes):
    generator, now = random.Random(cache_bytes), [0.0]
    engine = make_engine(_model(mixer), sequences=12, waiting=20, chunk=64, cache_bytes=cache_bytes)
    engine._clock = lambda: now[0]
    shared = [bytes(generator.choices(range(97, 123), k=24)).decode() for _ in range(3)]
    arrivals, at = [], 0.0
    while len(arrivals) < 750:
        at += generator.expovariate(1 / (0.0045 if len(arrivals) % 300 < 200 else 0.03))
        arrivals.append(at)
    accepted, refused, cancelled, results, groups, leaving = {}, 0, set(), {}, [], []
    while arrivals or not engine.is_idle:
        while arrivals and arrivals[0] <= now[0]:
            arrivals.pop(0)
            n = generator.choice([1, 1, 1, 3])
            group = Group(n)
            text = generator.choice([*shared, ""]) + "x" * generator.randrange(12)
            choosing = Choosing(temperature=generator.choice([0.0, 1.0]))
            new = [
                make_sequence(text, choosing, generator.randrange(1, 6), seed=i, group=group, ignore_eot=True)
                for i in range(n)
            ]
            try:
                engine.submit(new)
            except QueueFull:
                refused += n
                continue
            groups.append(group)
            accepted.update({sequence.number: sequence for sequence in new})
            leaving += [(now[0] + generator.random() * 0.2, s) for s in new if generator.random() < 0.3]
        for entry in [entry for entry in leaving if entry[0] <= now[0]]:
            leaving.remove(entry)
            if entry[1].number not in results or results[entry[1].number].finish is None:
                engine.cancel(entry[1])
                cancelled.add(entry[1].number)
        collect(results, engine.step())
        assert len(engine.slots) + len(engine._prefill) <= 12 and engine.cache.nbytes <= cache_bytes
        now[0] += STEP_SECONDS
    assert len(accepted) > 600 and refused > 30 and len(cancelled) > 100
    for number, sequence in accepted.items():
        if number in cancelled:
            assert number not in results or results[number].finish is None
        else:
            assert results[number].finish == "length" and len(sequence.generated) == sequence.max_tokens
    assert engine.metrics.cancelled == len(cancelled)
    assert all(group.row is None and group.logits_V is None for group in groups)
    assert_nothing_is_left(engine)
    cache = engine.cache
    assert cache.nbytes == sum(block.nbytes() for block in cache._blocks)
    assert cache.n_snapshots == sum(block.snapshot is not None for block in cache._blocks)
    assert cache.hits > 100 and cache.evicted > 0
    assert engine.metrics.first_token.counts[-1] == 0 and sum(engine.metrics.first_token.counts) > 600
