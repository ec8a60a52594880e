"""Score-first adaptation: what a score may depend on, that it is one of a distribution, and what it leaves behind."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusedlm.evaluate import score_documents
from fusedlm.evaluate.adapt import Finetune, HintTilt, NgramMixture, score_adapted
from fusedlm.model import build_model
from fusedlm.nn.quantized import replace_layers
from fusedlm.quant.rounding import round_weights
from fusedlm.testing.models import part_config, part_model, randomise_

VOCAB = 11
SPANS = {"window": 12, "stride": 4, "device": "cpu", "dtype": torch.float32}
TUNED = Finetune(lr=0.05, chunk=16)
METHODS = {
    "ngram": NgramMixture(),
    "ngram-orders": NgramMixture(orders=(1, 3), rate=0.2, reset=True),
    "tilt": HintTilt(rate=0.3),
    "tilt-reset": HintTilt(reset=True),
    "norms": TUNED,
    "norms-reset": replace(TUNED, reset=True, steps=2),
    "low-rank": replace(TUNED, parameters="low_rank", rank=2),
}


@pytest.fixture(scope="module")
def model():
    mixer = "{type: attention, n_heads: 2}"
    config = part_config(mixer, extra="logit_softcap: 15.0")
    return randomise_(build_model(config, vocab_size=VOCAB, seed=0)).double().eval()


@pytest.fixture(scope="module")
def documents():
    """Repetitive texts: n-grams return, within and between them."""
    generator = np.random.default_rng(0)
    phrase = generator.integers(0, VOCAB - 1, 9)
    texts = [np.concatenate([phrase[:5], generator.integers(0, VOCAB - 1, 4)] * n + [phrase]) for n in (3, 1, 4)]
    return [(np.array([VOCAB - 1, *text]), 2 * len(text)) for text in [*texts, phrase[:0]]]


def changed(documents, place, token, seed):
    """The documents with another token at a place of the text, and others after it."""
    generator, start, result = np.random.default_rng(seed), 0, []
    for tokens, n_bytes in documents:
        text = tokens[1:].copy()
        where = np.arange(start, start + len(text))
        text[where > place] = generator.integers(0, VOCAB - 1, int((where > place).sum()))
        text[where == place] = token
        result.append((np.array([tokens[0], *text]), n_bytes))
        start += len(text)
    return result


def nll(model, documents, method, **changes):
    return score_adapted(model, documents, method, **SPANS | changes).adapted_nll


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_score_depends_on_the_tokens_before_alone_and_is_one_of_a_distribution(model, documents, name, across):
    method, place = METHODS[name], 80
    spans = {"across_documents": across}
    before = nll(model, documents, method, **spans)
    plain = score_adapted(model, documents, method, **SPANS, **spans).plain_nll
    assert not np.allclose(before[:place], plain[:place], rtol=1e-3), "the method did nothing"
    total, actual = 0.0, int(np.concatenate([tokens[1:] for tokens, _ in documents])[place])
    for token in range(VOCAB):
        one = nll(model, changed(documents, place, token, seed=token), method, **spans)
        assert (one[:place] == before[:place]).all(), "a token changed a score before it"
        total += math.exp(-one[place])
        if token == actual:
            assert one[place] == before[place], "later tokens changed a probability"
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_plain_score_is_that_of_scoring_without_adaptation(model, documents, name):
    for across in (False, True):
        expected = score_documents(model, documents, across_documents=across, **SPANS)
        found = score_adapted(model, documents, METHODS[name], across_documents=across, **SPANS)
        assert found.plain.nll == pytest.approx(expected.nll, rel=1e-12)
        assert (found.plain.tokens, found.plain.bytes, found.plain.documents) == (expected.tokens, expected.bytes, 4)
        assert found.adapted.nll == pytest.approx(found.adapted_nll.sum(), rel=1e-12)
        assert found.gain.gain == pytest.approx(found.plain.bpb - found.adapted.bpb, abs=1e-12)


@pytest.mark.parametrize("name", ["norms", "norms-reset", "low-rank"])
def test_finetuning_leaves_the_model_as_it_was(model, documents, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, requires = list(model.modules()), [p.requires_grad for p in model.parameters()]
    nll(model, documents, METHODS[name])
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == requires
    assert all((value == before[key]).all() for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_leaves_the_model_as_it_was(model, documents, monkeypatch):
    modules = list(model.modules())
    monkeypatch.setattr("fusedlm.evaluate.adapt.finetune._Learner.step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nll(model, documents, METHODS["low-rank"])
    assert list(model.modules()) == modules and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["norms-reset", "norms"])
def test_reset_makes_documents_independent(model, documents, name):
    alone = np.concatenate([nll(model, [document], METHODS[name]) for document in documents[:3]])
    together = nll(model, documents, METHODS[name])
    assert np.allclose(alone, together, rtol=1e-12) == METHODS[name].reset


def test_a_chunk_is_scored_with_the_weights_from_before_it(model, documents):
    """The first chunk is scored plainly, the second with one step on the first: by hand, in float64."""
    method, (tokens, _) = replace(TUNED, lr=0.02), documents[2]
    found = score_adapted(model, documents[2:3], method, **SPANS)
    assert (found.adapted_nll[:16] == found.plain_nll[:16]).all()
    gains = [p for name, p in model.named_parameters() if p.dim() == 1 and "norm" in name]
    start = [p.detach().clone() for p in gains]
    optimizer = torch.optim.AdamW(gains, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    parts = [(0, 6), (6, 12), (12, 16)]  # training windows score half a window, with at most a window of inputs
    logits = [model(torch.tensor(tokens[max(0, b - 12) : b])[None]).logits[0] for _, b in parts]
    loss = sum(
        torch.nn.functional.cross_entropy(out[-(b - a) :], torch.tensor(tokens[a + 1 : b + 1]), reduction="sum")
        for out, (a, b) in zip(logits, parts, strict=True)
    )
    (loss / 16).backward()
    optimizer.step()
    with torch.no_grad():
        ids = torch.tensor(tokens[8:21])[None]
        expected = model(ids[:, :-1], targets=ids[:, 1:]).nll[0, -4:].numpy()
        for p, value in zip(gains, start, strict=True):
            p.copy_(value)
    model.zero_grad(set_to_none=True)
    assert np.allclose(found.adapted_nll[16:20], expected, rtol=1e-9)


def test_a_quantised_model_has_norms_alone_to_finetune(documents):
    model = part_model("{type: attention, n_heads: 2}", vocab_size=VOCAB).eval()
    replace_layers(model, round_weights(model, "int8"))
    assert np.isfinite(nll(model, documents, METHODS["norms"])).all()
    with pytest.raises(ValueError, match="no hidden matrix"):
        nll(model, documents, METHODS["low-rank"])


@pytest.mark.parametrize(
    "values,word",
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"chunk": 0}, "chunk=0"),
        ({"steps": 0}, "steps=0"),
        ({"rank": 0}, "rank=0"),
        ({"parameters": "all"}, "parameters='all'"),
    ],
)
def test_impossible_settings_are_named(values, word):
    with pytest.raises(ValueError, match=word):
        Finetune(**values)


@pytest.mark.parametrize(
    "changes,word",
    [({"window": None}, "needs a window"), ({"stride": 13}, "stride=13"), ({"batch_tokens": 0}, "batch_tokens=0")],
)
def test_impossible_arguments_are_named(model, documents, changes, word):
    with pytest.raises(ValueError, match=word):
        nll(model, documents, METHODS["ngram"], **changes)
    with pytest.raises(ValueError, match="no text"):
        nll(model, documents[3:], METHODS["ngram"])
