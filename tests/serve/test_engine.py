"""What the engine gives: the text of each sequence alone, whatever runs beside it."""

import pytest
import torch

from fusedlm.generation import generate
from fusedlm.serve import Choosing, Group, QueueFull
from fusedlm.testing import FFN_CASES, MIXER_CASES
from tests.serve.engines import (
    GREEDY,
    TOKENIZER,
    assert_nothing_is_left,
    collect,
    make_engine,
    make_model,
    make_sequence,
    run,
)

PROMPTS = ["It is ", "", "a prompt that is much longer than a chunk, and than any window", "né", "It is not so"]
FFN = "{type: swiglu, hidden: 48}"
CASES = [(case, FFN) for cases in MIXER_CASES.values() for case in cases]
CASES += [("{type: gdn, n_heads: 2, chunk_size: 8}", case) for cases in FFN_CASES.values() for case in cases]
CPU = {"device": "cpu", "dtype": torch.float32}


def alone(model, prompts, max_tokens=10, **options):
    return [generate(model, TOKENIZER, prompt, max_tokens=max_tokens, **CPU, **options) for prompt in prompts]


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_every_sequence_has_the_text_that_it_has_alone(mixer, ffn):
    model = make_model(mixer, ffn)
    expected = alone(model, PROMPTS, 7, temperature=0)
    engine = make_engine(model, cache_bytes=10**8, sequences=3)
    for _ in range(2):
        found = run(engine, [make_sequence(prompt, max_tokens=7) for prompt in PROMPTS])
        assert [result.text for result in found] == expected
        assert_nothing_is_left(engine)
    assert engine.cache.hits > 0


def test_sequences_that_come_and_go_leave_the_others_as_they_are(hybrid):
    prompts = [f"{i} times {i}, and " + "so on " * (i % 5) for i in range(12)]
    lengths = [3 + 7 * i % 23 for i in range(12)]
    expected = [alone(hybrid, [p], n, temperature=0)[0] for p, n in zip(prompts, lengths, strict=True)]
    engine, results, sequences = make_engine(hybrid, cache_bytes=10**6), {}, {}
    for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        sequences[i] = make_sequence(prompt, max_tokens=n)
        engine.submit([sequences[i]])
        for _ in range(i % 4):
            collect(results, engine.step())
        if i % 3 == 2:
            engine.cancel(sequences[i - 1])
    while not engine.is_idle:
        collect(results, engine.step())
    for i in range(12):
        found = results.get(sequences[i].number)
        if i % 3 != 1:
            assert found.text == expected[i] and found.finish
        elif found is not None:  # cancelled, and not a word more
            assert found.finish is None and expected[i].startswith(found.text)
    assert_nothing_is_left(engine)


def test_a_cancelled_sequence_gives_its_slot_to_others(hybrid):
    engine, results = make_engine(hybrid, sequences=3), {}
    prompts = ["one", "two", "three", "four"]
    sequences = [make_sequence(prompt, max_tokens=15, ignore_eot=True) for prompt in prompts]
    engine.submit(sequences)
    while len(engine.slots) < 3:
        collect(results, engine.step())
    before = results[sequences[0].number].text
    engine.cancel(sequences[0])
    assert len(engine.slots) == 2 and engine.metrics.cancelled == 1
    collect(results, engine.step())
    assert len(engine.slots) == 3
    while not engine.is_idle:
        collect(results, engine.step())
    assert results[sequences[0].number].text == before and results[sequences[0].number].finish is None
    for sequence, prompt in zip(sequences[1:], prompts[1:], strict=True):
        (expected,) = run(make_engine(hybrid), [make_sequence(prompt, max_tokens=15, ignore_eot=True)])
        assert results[sequence.number].text == expected.text
    assert_nothing_is_left(engine)


SETTINGS = [
    Choosing(temperature=1.0),
    Choosing(temperature=0.7, top_k=20),
    Choosing(temperature=1.3, top_p=0.8),
    Choosing(temperature=0.0),
    Choosing(temperature=1.0),
    Choosing(temperature=0.9, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={101: 3.0}),
]


def test_a_seed_holds_within_a_batch(hybrid):
    def make():
        return [
            make_sequence(f"text {i % 2}", choosing, max_tokens=20, seed=7 + i) for i, choosing in enumerate(SETTINGS)
        ]

    by_itself = [run(make_engine(hybrid), [sequence])[0].text for sequence in make()]
    assert [result.text for result in run(make_engine(hybrid, sequences=6), make())] == by_itself
    assert [result.text for result in run(make_engine(hybrid, sequences=2), make()[::-1])] == by_itself[::-1]
    assert len(set(by_itself)) == len(by_itself)
    settings = {"temperature": 1.0, "max_tokens": 20, **CPU}
    assert by_itself[0] == generate(hybrid, TOKENIZER, "text 0", seed=7, **settings)


def test_penalties_and_bias_are_those_of_their_definition(hybrid):
    choosing = Choosing(temperature=0.0, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={120: 1.0, 65: -50.0})
    (found,) = run(make_engine(hybrid), [make_sequence("abc", choosing, max_tokens=25)])
    ids, generated = [TOKENIZER.eot_id, *b"abc"], []
    for _ in range(25):
        with torch.no_grad():
            logits = hybrid(torch.tensor([ids + generated])).logits[0, -1].double()
        for token in set(generated):
            logits[token] -= 0.4 + 0.3 * generated.count(token)
        logits[120] += 1.0
        logits[65] -= 50.0
        token = int(logits[:257].argmax())
        if token == TOKENIZER.eot_id:
            break
        generated.append(token)
    assert found.text == TOKENIZER.decode(generated)
    assert found.text != run(make_engine(hybrid), [make_sequence("abc", GREEDY, max_tokens=25)])[0].text


def test_logprobs_are_those_of_plain_scoring(hybrid):
    choosing = Choosing(temperature=0.8, logprobs=3, presence_penalty=1.0)
    sequences = [
        make_sequence(text, choosing, max_tokens=15, seed=i, score_prompt=True, ignore_eot=True)
        for i, text in enumerate(["a text that is longer than one chunk", "ab", ""])
    ]
    found = run(make_engine(hybrid, cache_bytes=10**6), sequences)
    for sequence, result in zip(sequences, found, strict=True):
        ids = [*sequence.ids, *sequence.generated]
        with torch.no_grad():
            expected = hybrid(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scored = [*sequence.prompt_scores, *result.tokens]
        assert [token.id for token in scored] == ids[1:]
        for position, token in enumerate(scored):
            assert abs(token.logprob - expected[position, token.id].item()) < 1e-4
            assert [i for i, _ in token.top] == expected[position].topk(3).indices.tolist()
            assert abs(token.top[0][1] - expected[position].max().item()) < 1e-4


def test_choices_share_the_reading_of_their_prompt(hybrid):
    group = Group(5)
    choices = [make_sequence("a prompt", SETTINGS[0], seed=3 + i, group=group) for i in range(5)]
    engine = make_engine(hybrid, sequences=2)
    found = [result.text for result in run(engine, choices)]
    assert engine.metrics.prompt_tokens == len(choices[0].ids)
    for i in range(5):
        assert found[i] == run(make_engine(hybrid), [make_sequence("a prompt", SETTINGS[0], seed=3 + i)])[0].text
    assert group.row is None and group.logits_V is None


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_cancelled_choice_frees_what_the_others_share(hybrid, when):
    group = Group(3)
    text = "a prompt of more than one chunk, at least two"
    choices = [make_sequence(text, seed=i, group=group) for i in range(3)]
    engine, results = make_engine(hybrid, sequences=1), {}
    engine.submit(choices)
    for _ in range(when):
        collect(results, engine.step())
    engine.cancel(choices[0])
    engine.cancel(choices[2])
    while not engine.is_idle:
        collect(results, engine.step())
    expected = run(make_engine(hybrid), [make_sequence(text)])[0].text
    assert results[choices[1].number].text == expected
    assert group.row is None and group.n_waiting == 0
    assert_nothing_is_left(engine)


def test_the_queue_has_a_limit(hybrid):
    engine = make_engine(hybrid, sequences=2, waiting=3)
    engine.submit([make_sequence("x") for _ in range(5)])
    with pytest.raises(QueueFull, match="3 sequences are waiting, and at most 3 may"):
        engine.submit([make_sequence("x")])
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit([make_sequence("x")])
    for sequence in engine.sequences():
        engine.cancel(sequence)
    engine.submit([make_sequence("x")])
    with pytest.raises(ValueError, match="do not fit into the context of 256 tokens"):
        engine.submit([make_sequence("x" * 250, max_tokens=6)])


def test_logits_that_are_not_finite_end_their_sequence_alone():
    model = make_model("{type: attention, n_heads: 4}")
    with torch.no_grad():
        model.embedding.weight[ord("!")] = float("nan")
    good, bad = run(make_engine(model), [make_sequence("good"), make_sequence("bad!")])
    assert bad.finish == "error" and "not finite" in bad.pieces[-1].error
    assert good.finish != "error" and good.text == alone(model, ["good"], 12, temperature=0)[0]


@pytest.mark.parametrize("mixer", ["{type: attention, n_heads: 4}", "{type: attention, n_heads: 4, window: 9}"])
def test_a_slot_can_be_used_after_one_that_was_not_finite(mixer):
    model = make_model(mixer)
    with torch.no_grad():
        model.embedding.weight[ord("!")] = float("inf")
    engine = make_engine(model)
    other = make_sequence("the others", max_tokens=40, ignore_eot=True)
    bias = Choosing(temperature=0.0, logit_bias={ord("!"): 10**4})
    bad = make_sequence("bad " * 8, bias, max_tokens=40)  # its own token, fed back, is what breaks it
    engine.submit([other, bad])
    results = {}
    while bad.number not in results or results[bad.number].finish is None:
        collect(results, engine.step())
    assert results[bad.number].finish == "error" and len(engine.slots) == 1
    good = make_sequence("ok", max_tokens=12)
    engine.submit([good])
    while not engine.is_idle:
        collect(results, engine.step())
    assert results[good.number].text == alone(model, ["ok"], 12, temperature=0)[0]
    assert results[other.number].finish == "length"


def test_prompts_are_read_between_decoding_steps(hybrid):
    engine = make_engine(hybrid, chunk=16)
    first = make_sequence("a", max_tokens=30, ignore_eot=True)
    engine.submit([first])
    engine.step()
    engine.submit([make_sequence("x" * 100, max_tokens=1)])
    before, steps = len(first.generated), 0
    while len(engine.sequences()) == 2:
        engine.step()
        steps += 1
    assert steps == 7 and len(first.generated) - before == 7


def test_changed_weights_are_used_when_the_engine_is_idle():
    model = make_model()
    engine = make_engine(model, cache_bytes=10**6)
    sequence = "a prompt of some length that is kept"
    run(engine, [make_sequence(sequence)])
    assert len(engine.cache) > 0
    with torch.no_grad():
        model.head.weight.add_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(1)))
    assert run(engine, [make_sequence(sequence)])[0].text == alone(model, [sequence], 12, temperature=0)[0]
    assert engine.cache.hits == 0
