"""One optimizer step: the weight of each token, clipping, learning rates, skipped steps."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch
from fusedlm.distributed import World
from fusedlm.model import Output
from fusedlm.nn.module import Module, Normal, Role, init_weights
from fusedlm.optim import build_optimizer
from fusedlm.train.step import backward, train_step

CPU = torch.device("cpu")
SPREAD = 0.01  # weight of the layer loss


class TinyModel(Module):
    """The interface of the decoder, in float64: an embedding, a projection, a loss and a metric of a layer."""

    def __init__(self):
        super().__init__()
        self.add_parameter("embedding", (11, 5), Role("embedding", 5, 11), Normal(1.0))
        self.add_parameter("out", (11, 5), Role("head", 5, 11), Normal(1.0))
        self.factor = 1.0
        init_weights(self, seed=0)
        self.double()

    def forward(self, tokens, *, targets, loss_weight, batch_weight, documents=None):
        x = self.embedding[tokens]
        logits = x @ self.out.T
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        spread = SPREAD * x.square().mean()
        losses = {"nll": self.factor * nll.sum() * loss_weight, "spread": spread * batch_weight}
        return Output(None, nll.detach(), losses, {"seen": torch.tensor([tokens.numel(), 1])})


@pytest.fixture
def model():
    return TinyModel()


def uneven_batch(rows=slice(None)) -> Batch:
    """Six rows with 8, 7, 0, 1, 3 and 8 valid targets, or some of them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (6, 8), generator=generator)
    targets = torch.randint(11, (6, 8), generator=generator)
    for row, n_valid in enumerate((8, 7, 0, 1, 3, 8)):
        targets[row, n_valid:] = -100
    tokens, targets = tokens[rows], targets[rows]
    return Batch(tokens, targets, None, int((targets != -100).sum()), next_sample=6)


def expected_loss(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over the valid targets and the loss of the layer, of the full batch at once."""
    valid = batch.targets != -100
    x = model.embedding[batch.tokens]
    return nn.functional.cross_entropy(x[valid] @ model.out.T, batch.targets[valid]), SPREAD * x.square().mean()


def expected_gradients(model, batch: Batch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(sum(expected_loss(model, batch)), list(model.parameters())))


def assert_gradients(model, expected) -> None:
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 6])
def test_all_valid_tokens_have_the_same_weight_in_uneven_micro_batches(model, micro_batch_size):
    batch = uneven_batch()
    losses, metrics = backward(model, batch, micro_batch_size, contextlib.nullcontext)
    nll, spread = expected_loss(model, batch)
    torch.testing.assert_close(losses["nll"], nll.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["spread"], spread.detach(), rtol=1e-12, atol=0)
    assert metrics["seen"].tolist() == [48, -(-6 // micro_batch_size)]
    assert_gradients(model, expected_gradients(model, batch))


@dataclass(frozen=True)
class _HalfWorld(World):
    """One of two processes; the other one has the rest of the batch."""

    others: float = 0.0

    def sum(self, tensor):
        return tensor + self.others


def test_all_valid_tokens_have_the_same_weight_in_uneven_processes(model):
    """The gradients of the processes, each with its part of the rows, add up to that of the full batch."""
    parts = [uneven_batch(slice(0, 3)), uneven_batch(slice(3, 6))]
    losses = []
    for rank, part in enumerate(parts):
        world = _HalfWorld(rank, 2, others=parts[1 - rank].n_valid)
        losses.append(backward(model, part, 2, contextlib.nullcontext, world=world)[0])
    nll, spread = expected_loss(model, uneven_batch())
    torch.testing.assert_close(losses[0]["nll"] + losses[1]["nll"], nll.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[0]["spread"] + losses[1]["spread"], spread.detach(), rtol=1e-12, atol=0)
    assert_gradients(model, expected_gradients(model, uneven_batch()))


def step(model, optimizer, batch, **options):
    settings = {"lr_scale": 1.0, "micro_batch_size": 2, "grad_clip": None, "autocast": contextlib.nullcontext}
    return train_step(model, optimizer, batch, **{**settings, **options})


def test_the_result_has_each_loss_and_the_summed_metrics(model):
    nll, spread = (loss.item() for loss in expected_loss(model, uneven_batch()))
    result = step(model, build_optimizer(model, AdamWConfig(), CPU), uneven_batch())
    assert result.loss == pytest.approx(nll, rel=1e-6) and not result.skipped
    assert result.layer_losses == {"spread": pytest.approx(spread, rel=1e-6)}
    assert result.metrics["seen"].tolist() == [48, 3] and result.metrics["seen"].dtype == torch.int64


def test_results_are_summed_over_processes(model):
    world = _HalfWorld(0, 2, others=1000.0)
    result = step(model, build_optimizer(model, AdamWConfig(), CPU), uneven_batch(), world=world)
    assert result.loss > 1000 and result.layer_losses["spread"] > 1000
    assert result.metrics["seen"].tolist() == [1048, 1003]


def test_clipping_scales_the_accumulated_gradient_to_the_norm(model):
    seen = {}
    optimizer = build_optimizer(model, AdamWConfig(), CPU)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(norm=torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    )
    norm = torch.nn.utils.get_total_norm(expected_gradients(model, uneven_batch())).item()
    result = step(model, optimizer, uneven_batch(), grad_clip=norm / 4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert seen["norm"] == pytest.approx(norm / 4, rel=1e-4)
    result = step(model, optimizer, uneven_batch(), grad_clip=100.0)
    assert seen["norm"] == pytest.approx(result.grad_norm, rel=1e-6) and result.grad_norm < 100


@pytest.mark.parametrize("lr_scale", [0.0, 0.25])
def test_the_learning_rate_is_a_multiple_of_each_groups_peak(model, lr_scale):
    optimizer = torch.optim.SGD([{"params": [model.embedding], "lr": 2.0}, {"params": [model.out]}], lr=0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = expected_gradients(model, uneven_batch())
    step(model, optimizer, uneven_batch(), lr_scale=lr_scale)
    for parameter, start, gradient, lr in zip(model.parameters(), before, gradients, (2.0, 0.5), strict=True):
        torch.testing.assert_close(parameter, start - lr_scale * lr * gradient)


def sgd(model):
    """Not fused, with state."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model):
    return build_optimizer(model, AdamWConfig(), CPU)


@pytest.mark.parametrize("what", ["loss", "layer loss", "gradient", "no valid target"])
@pytest.mark.parametrize("build", [adamw, sgd])
def test_a_step_that_is_not_finite_changes_nothing(model, build, what):
    optimizer = build(model)
    batch = uneven_batch()
    step(model, optimizer, batch)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    hooks = contextlib.ExitStack()
    if what == "loss":
        model.factor = float("inf")
    elif what == "layer loss":
        hooks.callback(model.register_forward_hook(_spoil_spread).remove)
    elif what == "gradient":
        model.out.register_hook(lambda gradient: gradient * float("nan"))
    else:
        batch = Batch(batch.tokens, torch.full_like(batch.targets, -100), None, 0, 6)
    with hooks:
        result = step(model, optimizer, batch, grad_clip=1.0)
    assert result.skipped
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert all(torch.equal(v, m) for v, m in zip(after, moments, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def _spoil_spread(module, inputs, output: Output) -> Output:
    """A layer loss that is not finite, without an effect on the gradients."""
    return output._replace(losses=output.losses | {"spread": output.losses["spread"] + float("inf")})
