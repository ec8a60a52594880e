"""The laws of every mixer, feed-forward and recipe. A new part is covered by its name in fusedlm.testing.models."""

import math

import pytest
import torch

from fusedlm import build_model, load_recipe
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.mixers import MIXERS
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, backend_of, part_model
from tests.laws.definitions import routed_experts
from tests.laws.models import ALL_MODELS, N_TOKENS, RECIPES, VOCAB, one_period, parts, random_model, some_tokens


def test_every_part_has_a_case():
    assert set(MIXER_CASES) == set(MIXERS)
    assert set(FFN_CASES) == set(FFNS)


@ALL_MODELS
@torch.no_grad()
def test_causality(make):
    """To the last bit. Experts run token by token: their products may round by the number of their tokens."""
    model, tokens = random_model(make), some_tokens()
    with backend_of("routed_experts", routed_experts):
        before = model(tokens).logits
        for t in (0, 1, 7, 8, 20, N_TOKENS - 1):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % VOCAB
            after = model(changed).logits
            assert torch.equal(after[:, :t], before[:, :t]), f"a change at {t} moved an earlier logit"
            assert not torch.equal(after[:, t], before[:, t]), f"a change at {t} did not move its own logit"


@pytest.mark.parametrize("case", [case for case in FFN_CASES["moe"] if "n_experts: 0" not in case])
@torch.no_grad()
def test_the_definition_of_experts_is_what_runs(case):
    """So that the law of causality is that of the model."""
    model, tokens = random_model(lambda: part_model(MIXER_CASES["attention"][0], case, VOCAB)), some_tokens()
    expected = model(tokens).logits
    with backend_of("routed_experts", routed_experts):
        assert_close(model(tokens).logits, expected, 1e-12)


@ALL_MODELS
@pytest.mark.parametrize("reserve", [False, True])
@torch.no_grad()
def test_state(make, reserve):
    model, tokens = random_model(make), some_tokens()
    expected = model(tokens).logits
    assert torch.isfinite(expected).all()
    for cuts in ([1, 2, 3], [5, 6, 40], [42], list(range(1, 26)), []):
        state = model.init_state(2, max_tokens=N_TOKENS if reserve else None)
        spans = zip([0, *cuts], [*cuts, N_TOKENS], strict=True)
        pieces = [model(tokens[:, a:b], state=state).logits for a, b in spans]
        assert_close(torch.cat(pieces, dim=1), expected, 1e-10, f"cut at {cuts}")
        assert state.length == N_TOKENS


ENDS = [[0, 3, 4, 20, N_TOKENS], [0, 17, 41, 42, N_TOKENS]]  # of the documents of two rows


def _documents():
    documents = torch.zeros(2, N_TOKENS, dtype=torch.int64)
    for row, ends in enumerate(ENDS):
        for number, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            documents[row, a:b] = 7 * number % 5  # numbers need not be increasing
    return documents


@ALL_MODELS
@torch.no_grad()
def test_documents(make):
    model, tokens, documents = random_model(make), some_tokens(), _documents()
    packed = model(tokens, documents=documents).logits
    for row, ends in enumerate(ENDS):
        alone = [model(tokens[row : row + 1, a:b]).logits for a, b in zip(ends, ends[1:], strict=False)]
        assert_close(packed[row : row + 1], torch.cat(alone, dim=1), 1e-10, f"row {row}")
    assert not torch.allclose(packed, model(tokens).logits), "documents made no difference"
    for cuts in ([4, 18, 30], [1, 2, 3, 4, 5], [41, 42]):
        state = model.init_state(2)
        spans = zip([0, *cuts], [*cuts, N_TOKENS], strict=True)
        pieces = [model(tokens[:, a:b], documents=documents[:, a:b], state=state).logits for a, b in spans]
        assert_close(torch.cat(pieces, dim=1), packed, 1e-10, f"packed, cut at {cuts}")


@ALL_MODELS
def test_documents_gradients(make):
    model, tokens = random_model(make), some_tokens(batch=1)
    targets = tokens.roll(-1, 1)
    documents = (torch.arange(N_TOKENS) >= 19).long()[None]

    def nll(span, documents=None):
        inputs = {"documents": documents, "targets": targets[:, span], "loss_weight": torch.ones(())}
        return model(tokens[:, span], **inputs).losses["nll"]

    nll(slice(None), documents).backward()
    # Multi-token prediction has no part in this loss; tests/model/test_multi_token.py has its documents.
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("mtp.")}
    packed = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    (nll(slice(0, 19)) + nll(slice(19, None))).backward()
    for name, parameter in parameters.items():
        assert_close(packed[name], parameter.grad, 1e-9, name)


def _starts():
    yield from parts()
    for path in RECIPES:
        recipe = load_recipe(path)
        vocab = {"bytes": 257, "bpe": 2048, "file": 50257}[recipe.data.tokenizer.type]
        config = recipe.model
        if any(getattr(block.ffn, "n_experts", 0) for block in config.blocks.values()):
            config = one_period(recipe)  # of the full depth and width they are as large as a machine
        yield pytest.param(lambda config=config, vocab=vocab: build_model(config, vocab_size=vocab), id=path.stem)


@pytest.mark.parametrize("make", list(_starts()))
def test_start(make):
    torch.manual_seed(0)
    model = make().eval()
    tokens = torch.randint(0, model.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).losses["nll"].item()
    assert abs(loss / math.log(model.vocab_size) - 1) < 0.05
