"""Continuations that share the state of their contexts are scored as each pair alone."""

import random

import pytest
import torch

from fusedlm.evaluate.continuations import ContinuationScorer
from fusedlm.testing import FFN_CASES, MIXER_CASES, part_model, randomise_

SWIGLU = "{type: swiglu, hidden: 48}"
CASES = [(cases[0], SWIGLU) for cases in MIXER_CASES.values()]
CASES += [("{type: attention, n_heads: 4, n_kv_heads: 1, window: 5}", SWIGLU)]
CASES += [("{type: gdn, n_heads: 2, chunk_size: 8}", FFN_CASES["moe"][0])]


def _pairs(generator):
    """Of few-shot questions: a common beginning, contexts, several continuations of each, in any order."""
    ids = lambda n: generator.choices(range(61), k=n)  # noqa: E731
    beginning, pairs = ids(40), []
    for _ in range(7):
        context = [*beginning, *ids(generator.randrange(1, 25))]
        pairs += [(context, ids(generator.randrange(1, 9))) for _ in range(4)]
    pairs += [([3], ids(30)), (ids(5), []), ([3], ids(2)), (beginning, ids(3)), (beginning[:20], ids(4))]
    generator.shuffle(pairs)
    return pairs


def _alone(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
    before = logits[len(context) - 1 : len(context) - 1 + len(continuation)]
    nll = -sum(row[token].item() for row, token in zip(before, continuation, strict=True))
    return nll, before.argmax(-1).tolist() == list(continuation)


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_every_pair_has_the_likelihood_that_it_has_alone(mixer, ffn):
    model = randomise_(part_model(mixer, ffn).double()).eval()
    pairs = _pairs(random.Random(1))
    for i in range(0, len(pairs), 3):  # some that are greedy
        context, continuation = pairs[i]
        for j in range(len(continuation)):
            with torch.no_grad():
                continuation[j] = int(model(torch.tensor([[*context, *continuation[:j]]])).logits[0, -1].argmax())
    expected = [_alone(model, *pair) for pair in pairs]
    assert {greedy for _, greedy in expected} == {True, False}
    for batch_tokens in (100, 700, None):
        scorer = ContinuationScorer(model, torch.device("cpu"), torch.float32, batch_tokens)
        found = scorer.score(pairs)
        assert [result.is_greedy for result in found] == [greedy for _, greedy in expected]
        torch.testing.assert_close(
            torch.tensor([result.nll for result in found]), torch.tensor([nll for nll, _ in expected])
        )
        n_tokens = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        assert scorer.n_read < 0.4 * n_tokens


def test_what_is_refused():
    scorer = ContinuationScorer(part_model("{type: attention, n_heads: 4}").eval(), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="pair 1 has no context"):
        scorer.score([([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="outside of the vocabulary of 61"):
        scorer.score([([1], [61])])
    assert scorer.score([]) == []
