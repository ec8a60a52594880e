"""Every sample has the log-likelihood, the greedy flag and the text that lm-eval's `hf` back end gives it."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import fusedlm
from fusedlm.harness.model import RunModel

WORDS = ["Document", "says", "that", "times", "makes", "naïvely", "and", "12", "makes", "144", ",", ".", "7", "the"]
MAX_LENGTH = 64


def _text(generator, n):
    return " ".join(generator.choices(WORDS, k=n))


def _instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module", params=["llama", "qwen3_5", "bamba"])
def both(request, cases):  # noqa: F811
    """The run, and `hf` with what was exported of it, in float32 and one by one."""
    case = cases[request.param]
    model, tokenizer, _ = fusedlm.load(case.run)
    ours = RunModel(model, tokenizer, MAX_LENGTH, device=torch.device("cpu"), dtype=torch.float32, quiet=True)
    theirs = HFLM(pretrained=str(case.folder), device="cpu", dtype="float32", batch_size=1, max_length=MAX_LENGTH)
    return ours, theirs


def _same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [nll for nll, _ in found] == pytest.approx([nll for nll, _ in expected], rel=1e-5, abs=2e-4)


def test_loglikelihoods(both):
    ours, theirs = both
    generator = random.Random(0)
    shots = _text(generator, 12) + "\n\n"
    pairs = [(shots + _text(generator, 3 + i), " " + _text(generator, 1 + j)) for i in range(4) for j in range(3)]
    pairs += [("", "Document"), ("Document 3 says ", "that"), ("times  ", " 3"), ("x" * 150, " yes"), ("né", "e")]
    contexts = [_text(generator, 4 + i) for i in range(8)]
    options = {"until": [], "max_gen_toks": 1}
    first = theirs.generate_until(_instances("generate_until", [(context, options) for context in contexts]))
    pairs += [pair for pair in zip(contexts, first, strict=True) if pair[1]]
    requests = _instances("loglikelihood", pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    _same(found, expected)
    assert {greedy for _, greedy in found} == {True, False}
    one_by_one = [ours.loglikelihood([request])[0] for request in requests]
    _same(one_by_one, expected)


def test_rolling_loglikelihoods(both):
    ours, theirs = both
    generator = random.Random(1)
    texts = [(_text(generator, n),) for n in (1, 10, 90)]
    requests = _instances("loglikelihood_rolling", texts)
    found = ours.loglikelihood_rolling(requests)
    # Their tokens begin with end-of-text, which is then predicted from itself; ours is only context.
    theirs.add_bos_token = False
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    theirs.add_bos_token = None
    assert found == pytest.approx(expected, rel=1e-5, abs=2e-4)


def test_generated_texts(both):
    ours, theirs = both
    generator = random.Random(2)
    arguments = [(_text(generator, 2 + 9 * i), {"until": ["\n", " ma"], "max_gen_toks": 12}) for i in range(4)]
    arguments += [(text, {"until": [], "max_gen_toks": 7}) for text, _ in arguments[:2]]
    requests = _instances("generate_until", arguments)
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
