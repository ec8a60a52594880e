import contextlib

import pytest
import torch
from torch import nn

from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch
from fusedlm.optim import build_optimizer
from fusedlm.train.step import backward, train_step


class TinyModel(nn.Module):
    """The interface of the decoder's loss over an embedding and a projection, in float64."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5, dtype=torch.float64)
        self.out = nn.Linear(5, 11, dtype=torch.float64)

    def loss(self, tokens, targets, documents=None):
        logits = self.out(self.embedding(tokens))
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return nll.view_as(targets)

    def weighted_loss(self, tokens, targets, weight, documents=None):
        return self.loss(tokens, targets, documents).sum() * weight


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel()


def uneven_batch():
    """Six rows with 8, 7, 0, 1, 3 and 8 valid targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (6, 8), generator=generator)
    targets = torch.randint(11, (6, 8), generator=generator)
    for row, n_valid in enumerate((8, 7, 0, 1, 3, 8)):
        targets[row, n_valid:] = -100
    return Batch(tokens, targets, None, int((targets != -100).sum()), next_sample=6)


def gradients(model, batch, micro_batch_size):
    model.zero_grad()
    loss = backward(model, batch, micro_batch_size, contextlib.nullcontext)
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_valid_token_weighs_the_same_in_unequal_micro_batches(model, micro_batch_size):
    batch = uneven_batch()
    whole_loss, whole = gradients(model, batch, 6)
    loss, parts = gradients(model, batch, micro_batch_size)
    valid = batch.targets != -100
    mean = nn.functional.cross_entropy(model.out(model.embedding(batch.tokens[valid])), batch.targets[valid])
    torch.testing.assert_close(loss, mean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-15)


def step(model, optimizer, batch, **options):
    settings = {"lr": 0.01, "micro_batch_size": 2, "grad_clip": None, "autocast": contextlib.nullcontext}
    return train_step(model, optimizer, batch, **{**settings, **options})


def test_clipping_scales_the_accumulated_gradient_to_the_norm(model):
    seen = {}
    optimizer = build_optimizer(model, AdamWConfig(), torch.device("cpu"))
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(norm=torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    )
    _, whole = gradients(model, uneven_batch(), 6)
    norm = torch.nn.utils.get_total_norm(whole).item()
    model.zero_grad()
    result = step(model, optimizer, uneven_batch(), grad_clip=norm / 4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert seen["norm"] == pytest.approx(norm / 4, rel=1e-4)
    step(model, optimizer, uneven_batch(), grad_clip=100.0)
    assert 0 < seen["norm"] < 100


def test_the_learning_rate_of_the_step_is_used(model):
    optimizer = build_optimizer(model, AdamWConfig(lr=1.0), torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, optimizer, uneven_batch(), lr=0.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient", "no valid target"])
def test_a_step_that_is_not_finite_changes_nothing(model, what):
    optimizer = build_optimizer(model, AdamWConfig(), torch.device("cpu"))
    batch = uneven_batch()
    step(model, optimizer, batch)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    if what == "loss":
        clean = model.loss
        model.loss = lambda *arguments, **options: clean(*arguments, **options) * float("inf")
    elif what == "gradient":
        model.out.bias.register_hook(lambda gradient: gradient * float("nan"))
    else:
        batch = Batch(batch.tokens, torch.full_like(batch.targets, -100), None, 0, 6)
    result = step(model, optimizer, batch, grad_clip=1.0)
    assert result.skipped
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert all(torch.equal(v, m) for v, m in zip(after, moments, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
