"""The rule that keeps or rejects drafts: the distribution of the text is that of the model, exactly."""

import pytest
import torch

from fusedlm.generation.acceptance import Speculation, accept
from fusedlm.generation.sampling import Sampling, next_token_probabilities, probabilities
from fusedlm.ops.draw.reference import invert

VOCAB, DRAFTS, ROWS = 5, 2, 40_000
SAMPLINGS = [Sampling(9, 1.0, None, None), Sampling(9, 0.7, 3, None), Sampling(9, 1.3, None, 0.8)]
CRITICAL = 1e-4  # of chi-squared, below which two distributions are held to differ


def _logits(seed, *shape):
    return 1.5 * torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _p_value(found, expected):
    """Of chi-squared, counts against probabilities; 0 where something is counted that has none."""
    if found[expected == 0].any():
        return 0.0
    found, expected = found[expected > 0].double(), expected[expected > 0] * found.sum()
    statistic = ((found - expected) ** 2 / expected).sum()
    half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item()


def _texts(sampling, rule):
    """Three tokens of each row: of one step, filled up by drawing from the model, whose logits after each prefix are
    those of a table. Drafts come from another model."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(ROWS, 2 * DRAFTS + 3, generator=generator, dtype=torch.float64)
    model = [_logits(1), _logits(2, VOCAB), _logits(3, VOCAB, VOCAB)]
    drafter = [_logits(4), _logits(5, VOCAB)]
    first_q = probabilities(drafter[0].expand(ROWS, -1), sampling)
    first = invert(first_q, uniform[:, 0])
    second_q = probabilities(drafter[1][first], sampling)
    second = invert(second_q, uniform[:, 1])
    drafts = torch.stack([first, second], dim=1)
    logits = torch.stack([model[0].expand(ROWS, -1), model[1][first], model[2][first, second]], dim=1)
    tokens, n_kept = rule(logits, drafts, torch.stack([first_q, second_q], dim=1), uniform[:, 2:5], sampling)
    tokens = tokens.clone()
    for j in (1, 2):
        prefix = tokens[:, :j].unbind(1)
        drawn = invert(probabilities(model[j][prefix], sampling), uniform[:, 4 + j])
        tokens[:, j] = torch.where(n_kept >= j, tokens[:, j], drawn)
    counts = torch.bincount(tokens[:, 0] * VOCAB**2 + tokens[:, 1] * VOCAB + tokens[:, 2], minlength=VOCAB**3)
    p = [torch.stack([next_token_probabilities(x, *_options(sampling)) for x in t.view(-1, VOCAB)]) for t in model]
    exact = p[0][0][:, None, None] * p[1][:, :, None] * p[2].view(VOCAB, VOCAB, VOCAB)
    return counts, exact.flatten(), n_kept


def _options(sampling):
    return sampling.temperature, sampling.top_k, sampling.top_p


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "top_k", "top_p"])
def test_sampled_texts_have_the_distribution_of_the_model(sampling):
    counts, exact, n_kept = _texts(sampling, accept)
    assert exact.sum().item() == pytest.approx(1) and n_kept.unique().tolist() == [0, 1, 2]
    assert _p_value(counts, exact) > 0.01


def _keeps_likely_drafts(logits, drafts, q, uniform, sampling):
    """Wrong: keeps a draft with the probability that the model gives it."""
    return accept(logits, drafts, torch.ones_like(q), uniform, sampling)


def _draws_from_the_model_after_a_rejection(logits, drafts, q, uniform, sampling):
    """Wrong: the token after a rejected draft comes from p in place of max(0, p - q)."""
    tokens, n_kept = accept(logits, drafts, q, uniform, sampling)
    p = probabilities(logits.flatten(0, 1), sampling).view_as(logits)
    last = invert(p[torch.arange(len(p)), n_kept], uniform[:, -1])
    return tokens.scatter(1, n_kept[:, None], last[:, None]), n_kept


def _keeps_all(logits, drafts, q, uniform, sampling):
    """Wrong: keeps every draft."""
    return accept(logits, drafts, torch.zeros_like(q), uniform, sampling)


@pytest.mark.parametrize("rule", [_keeps_likely_drafts, _draws_from_the_model_after_a_rejection, _keeps_all])
def test_a_wrong_rule_is_found_by_the_test_of_the_distribution(rule):
    counts, exact, _ = _texts(SAMPLINGS[0], rule)
    assert _p_value(counts, exact) < CRITICAL


def test_drafts_are_kept_as_often_as_the_distributions_overlap():
    """The sum of min(p, q), the most that any rule can keep."""
    sampling = SAMPLINGS[0]
    _, _, n_kept = _texts(sampling, accept)
    p, q = (probabilities(_logits(seed)[None], sampling)[0] for seed in (1, 4))
    overlap = torch.minimum(p, q).sum().item()
    assert (n_kept > 0).double().mean().item() == pytest.approx(overlap, abs=4 * (0.25 / ROWS) ** 0.5)


def test_equal_distributions_keep_every_draft():
    logits = _logits(1, 7, 3)
    q = probabilities(logits.flatten(0, 1), SAMPLINGS[0]).view(7, 3, VOCAB)[:, :2]
    uniform = torch.full((7, 3), 1 - 2**-53, dtype=torch.float64)  # the largest there is
    tokens, n_kept = accept(logits, q.argmax(-1), q, uniform, SAMPLINGS[0])
    assert ((n_kept == 2) | (tokens.gather(1, n_kept[:, None])[:, 0] >= 0)).all()


def test_greedy_drafts_are_kept_while_they_are_the_most_likely_token():
    logits = torch.zeros(4, 3, VOCAB)
    logits[:, 0, 1] = logits[:, 1, 2] = logits[:, 2, 3] = 1.0
    drafts = torch.tensor([[1, 2], [1, 4], [4, 2], [0, 0]])
    tokens, n_kept = accept(logits, drafts, None, None, Sampling(9, 0.0, None, None))
    assert n_kept.tolist() == [2, 1, 0, 0] and tokens.tolist() == [[1, 2, 3]] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_are_not_finite(temperature, place):
    logits = torch.zeros(2, 3, VOCAB)
    logits[1, place, 2] = torch.nan
    sampling, q = Sampling(9, temperature, None, None), torch.full((2, 2, VOCAB), 1 / VOCAB, dtype=torch.float64)
    tokens, n_kept = accept(logits, torch.zeros(2, 2, dtype=torch.int64), q, torch.zeros(2, 3).double(), sampling)
    ends = tokens.gather(1, n_kept[:, None])[:, 0]
    assert ends[1] == -1 and n_kept[1] == place and ends[0] >= 0


def test_counts():
    speculation = Speculation(3)
    for n_kept in (0, 1, 3, 3):
        speculation.count(n_kept)
    assert speculation.steps == 4 and speculation.acceptance() == [0.75, 0.5, 0.5]
    assert speculation.tokens_per_step() == 2.75
    assert Speculation(1).acceptance() == [0.0]
    for wrong in (0, -1, 33, 1.0, True, "2"):
        with pytest.raises(ValueError, match="must be an integer from 1 to 32"):
            Speculation(wrong)
