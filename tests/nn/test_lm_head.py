"""The head's loss, with all logits and in chunks."""

import pytest
import torch

from fusedlm.model.precision import autocast
from fusedlm.nn import lm_head
from fusedlm.ops.common import OPS
from fusedlm.testing import assert_close, backend_of, part_model, randomise_

chunked = pytest.importorskip("fusedlm.ops.linear_cross_entropy.chunked")
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


@pytest.mark.parametrize("extra", ["", "logit_softcap: 5.0", "logit_rescale: {}", "tie_embeddings: false"])
def test_the_loss_in_chunks_is_that_of_all_logits(monkeypatch, extra):
    model, tokens, targets = _model(extra)
    weight = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    logits = model(tokens).logits
    nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0.0)
    expected = _gradients(model, 0.3 * nll.sum())
    calls = []

    def function(x, *rest):
        calls.append(x.shape)
        return chunked.linear_softcap_cross_entropy(x, *rest)

    monkeypatch.setattr(chunked, "chunk_rows", lambda n_tokens, n_classes, itemsize, held=0: 16)
    for backend in ("reference", "test"):
        model.use_backends({"linear_softcap_cross_entropy": backend})
        with backend_of("linear_softcap_cross_entropy", function):
            output = model(tokens, targets=targets, loss_weight=weight)
        assert_close(output.losses["nll"], 0.3 * nll.sum(), 1e-6)
        assert_close(output.nll, nll, 1e-6)
        assert not output.nll[0, :5].any() and not output.nll.requires_grad
        for name, gradient in _gradients(model, output.total()).items():
            assert_close(gradient, expected[name], 1e-5, name)
    assert calls == [(60, 32)]


def test_without_gradients_logits_are_held_in_pieces(monkeypatch):
    model, tokens, targets = _model()
    expected = model(tokens, targets=targets)
    sizes = []

    def function(x, *rest):
        sizes.append(len(x))
        return OPS["linear_softcap_cross_entropy"].backends["reference"].run(x, *rest)

    monkeypatch.setattr(lm_head, "_LOGITS", 64 * 25)  # 25 tokens of the 64 rows of the head
    with torch.no_grad(), backend_of("linear_softcap_cross_entropy", function, fused=False):
        output = model(tokens, targets=targets)
    assert sizes == [25, 25, 10]
    assert_close(output.losses["nll"], expected.losses["nll"], 1e-6)
    assert_close(output.nll, expected.nll, 1e-6)


def test_the_mean_is_over_valid_targets():
    model, tokens, targets = _model()
    output = model(tokens, targets=targets)
    assert_close(output.losses["nll"], output.nll.sum() / 55, 1e-6)
    nothing = model(tokens, targets=torch.full_like(targets, -100))
    assert nothing.losses["nll"].item() == 0 and not nothing.nll.any()


def test_autocast_decides_the_dtype_of_the_product():
    """Also of a residual stream in float32."""
    model, _, targets = _model()
    seen = []

    def function(x, *rest):
        seen.append(x.dtype)
        return x.float().sum(), None

    with backend_of("linear_softcap_cross_entropy", function):
        for dtype in (torch.bfloat16, torch.float32):
            with autocast(DEVICE, dtype):
                model.head(torch.randn(60, 32, device=DEVICE), targets.flatten(), torch.ones((), device=DEVICE))
    assert seen == [torch.bfloat16, torch.float32]
