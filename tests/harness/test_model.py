"""The rules of lm-eval for contexts and continuations, and what its back ends get wrong."""

import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fusedlm.data.tokenizer import ByteTokenizer, train_bpe
from fusedlm.harness.model import RunModel
from fusedlm.harness.pairs import encode_pair, rolling_pairs, shortened
from fusedlm.testing import MIXER_CASES, part_model, randomise_

BPE = train_bpe(["hello world, hello there. the other world is there "] * 20, 300)


def make(mixer="{type: gdn, n_heads: 2, chunk_size: 8}", tokenizer=BPE, max_length=48, model=None):
    if model is None:
        model = randomise_(part_model(mixer, vocab_size=tokenizer.vocab_size, extra="tie_embeddings: false")).eval()
    return RunModel(model, tokenizer, max_length, device=torch.device("cpu"), dtype=torch.float32, quiet=True)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_pairs_are_those_of_lm_eval():
    wrapped = make()
    for context, continuation in [("hello", " world"), ("hello ", "world"), ("hello   ", "there"), ("hello.", " the")]:
        assert encode_pair(BPE, context, continuation) == wrapped._encode_pair(context, continuation)
    assert encode_pair(BPE, "", "hello") == ([BPE.eot_id], BPE.encode("hello"))


def test_a_merge_across_the_boundary_leaves_something_to_score():
    found = None
    for text in ("hello", "there", "world", "other"):
        for i in range(1, len(text)):
            context, continuation = text[:i], text[i:]
            if len(BPE.encode(text)) <= len(BPE.encode(context)):
                found = context, continuation
    assert found, "no merge crosses a boundary"
    context, continuation = encode_pair(BPE, *found)
    assert continuation and context + continuation == [BPE.eot_id, *BPE.encode("".join(found))]
    ((nll, _),) = make().loglikelihood(instances("loglikelihood", [found]))
    assert nll < 0


def test_an_empty_continuation_is_certain():
    assert make().loglikelihood(instances("loglikelihood", [("hello", ""), ("", "")])) == [(0.0, True)] * 2


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 40])
def test_rolling_windows_are_those_of_lm_eval(n):
    text = "x" * n
    expected = map(
        make_disjoint_window,
        get_rolling_token_windows(ByteTokenizer().encode(text), ByteTokenizer.eot_id, max_seq_len=8, context_len=1),
    )
    assert rolling_pairs(ByteTokenizer(), text, 8) == list(expected)


def test_end_of_text_is_not_predicted_from_itself():
    wrapped = make(tokenizer=ByteTokenizer())
    (found,) = wrapped.loglikelihood_rolling(instances("loglikelihood_rolling", [("naïve",)]))
    ids = [ByteTokenizer.eot_id, *"naïve".encode()]
    with torch.no_grad():
        logprobs = wrapped._model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert math.isclose(found, sum(logprobs[i, token].item() for i, token in enumerate(ids[1:])), abs_tol=1e-4)


def test_long_pairs_keep_their_last_tokens():
    assert shortened((list(range(10)), [20, 21]), 5) == ([6, 7, 8, 9], [20, 21])
    assert shortened(([1], [2, 3, 4]), 3) == ([1], [2, 3, 4])
    with pytest.raises(ValueError, match="a continuation of 4 tokens is longer than max_length=3"):
        shortened(([1], [2, 3, 4, 5]), 3)


@pytest.mark.parametrize("mixer", [cases[0] for cases in MIXER_CASES.values()])
def test_contexts_are_read_once(mixer):
    wrapped = make(mixer, ByteTokenizer(), max_length=400)
    shots = "a question and its answer. " * 8
    pairs = [(f"{shots}question {i}", f" answer {j}") for i in range(6) for j in range(4)]
    found = wrapped.loglikelihood(instances("loglikelihood", pairs))
    total = sum(len(context) + len(continuation) for context, continuation in pairs)
    assert wrapped.scorer.n_read < total / 8
    alone = make(mixer, ByteTokenizer(), 400, wrapped._model)
    for index in (0, 11, 23):
        ((nll, greedy),) = alone.loglikelihood(instances("loglikelihood", [pairs[index]]))
        assert math.isclose(nll, found[index][0], rel_tol=1e-5) and greedy == found[index][1]


def test_generation_has_the_semantics_of_its_options():
    wrapped = make(tokenizer=ByteTokenizer(), max_length=40)
    plain = wrapped.generate_until(instances("generate_until", [("hello", {"until": [], "max_gen_toks": 20})]))[0]
    assert plain
    stop = plain[3:5]
    options = {"until": [stop, "never"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.9}
    (found,) = wrapped.generate_until(instances("generate_until", [("hello", options)]))
    assert found == plain.split(stop)[0]
    long = "x" * 100 + "hello"  # cut on the left
    ids = wrapped._sequence(long, {"until": [], "max_gen_toks": 20}, 0).ids
    assert ids == [*long.encode()][-20:]
    refused = (({"num_beams": 4}, "num_beams=4"), ({"max_gen_toks": 40}, "from 1 to 39"), ({"typical_p": 1}, "typical"))
    for options, said in refused:
        with pytest.raises(ValueError, match=said):
            wrapped.generate_until(instances("generate_until", [("x", {"until": []} | options)]))
    options = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 9}
    sampled = instances("generate_until", [("x", options)] * 2)
    first, second = wrapped.generate_until(sampled)
    assert first != second and [first, second] == wrapped.generate_until(sampled)
