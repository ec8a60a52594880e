"""The head's loss by tokens and as one weighted sum, with all logits and in chunks."""

import pytest
import torch

from fusedlm.model.precision import autocast
from fusedlm.ops.common import Choice
from fusedlm.testing import assert_close, part_model, randomise_

chunked = pytest.importorskip("fusedlm.ops.linear_softcap_cross_entropy.chunked")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model(extra=""):
    torch.manual_seed(0)
    model = randomise_(part_model("{type: attention, n_heads: 4}", extra=extra)).to(DEVICE)
    tokens = torch.randint(0, 61, (3, 20), device=DEVICE)
    targets = tokens.roll(-1, 1).clone()
    targets[0, :5] = -100
    return model, tokens, targets


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("extra", ["", "logit_softcap: 5.0", "tie_embeddings: false"])
def test_the_weighted_sum_is_that_of_the_tokens(monkeypatch, extra):
    """Also in chunks, of which there are several here and which then are what runs."""
    model, tokens, targets = _model(extra)
    weight = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    nll = model.loss(tokens, targets)
    assert nll.shape == (3, 20) and not nll[0, :5].any()
    expected = _gradients(model, 0.3 * nll.sum())
    calls = []

    def function(x, *rest):
        calls.append(x.shape)
        return chunked.linear_softcap_cross_entropy(x, *rest)

    monkeypatch.setattr(chunked, "chunk_rows", lambda n_tokens, n_classes, itemsize, held=0: 16)
    reference = model.head.linear_loss
    assert DEVICE.type == "cuda" or reference.name == "reference"
    for choice in (reference, Choice("linear_softcap_cross_entropy", "chunked", "for the test", function)):
        model.head.linear_loss = choice
        total = model.weighted_loss(tokens, targets, weight)
        assert_close(total, 0.3 * nll.sum(), 1e-6)
        for name, gradient in _gradients(model, total).items():
            assert_close(gradient, expected[name], 1e-5, name)
    assert calls == [(60, 32)]


def test_autocast_decides_the_dtype_of_the_product():
    """Also of a residual stream in float32."""
    model, _, targets = _model()
    seen = []

    def function(x, *rest):
        seen.append(x.dtype)
        return x.float().sum(), None

    model.head.linear_loss = Choice("linear_softcap_cross_entropy", "chunked", "for the test", function)
    for dtype in (torch.bfloat16, torch.float32):
        with autocast(DEVICE, dtype):
            model.head(torch.randn(60, 32, device=DEVICE), targets.flatten(), torch.ones((), device=DEVICE))
    assert seen == [torch.bfloat16, torch.float32]
