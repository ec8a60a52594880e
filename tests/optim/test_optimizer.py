import copy

import pytest
import torch
from torch import nn

from fusedlm.config.train import AdamWConfig
from fusedlm.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors, parameter_groups, update_if


class Tied(nn.Module):
    """A tied embedding, a norm, biases and a matrix that is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.frozen(self.down(self.up(self.norm(self.embedding(tokens))))))


def names(model, group):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(by_id[id(parameter)] for parameter in group["params"])


def test_only_matrices_are_decayed_and_a_tied_embedding_counts_once():
    model = Tied()
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == ["down.weight", "up.weight"]
    assert names(model, kept) == ["embedding.weight", "norm.bias", "norm.weight", "up.bias"]


def test_a_model_of_norms_alone_has_one_group():
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1


def take_steps(model, optimizer, n):
    for step in range(n):
        model(torch.arange(7) * (step + 1) % 7).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_matches_the_published_update():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    start = layer.weight.detach().double()
    optimizer = build_optimizer(layer, AdamWConfig(lr=0.1, weight_decay=0.5, eps=1e-8), torch.device("cpu"))
    layer.weight.grad = torch.full((2, 3), 2.0)
    optimizer.step()
    # On the first step the bias-corrected moments are g and g squared, so the update is lr * sign(g).
    torch.testing.assert_close(layer.weight.double(), start * (1 - 0.1 * 0.5) - 0.1, rtol=0, atol=1e-6)


def test_state_round_trip_continues_bit_for_bit():
    torch.manual_seed(0)
    straight = Tied()
    config = AdamWConfig(lr=0.01)
    optimizer = build_optimizer(straight, config, torch.device("cpu"))
    take_steps(straight, optimizer, 3)
    resumed = Tied()
    resumed.load_state_dict(straight.state_dict())
    second = build_optimizer(resumed, config, torch.device("cpu"))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(straight, optimizer).items()}
    assert sum(name.endswith("/embedding.weight") for name in saved) == 3
    load_optimizer_tensors(resumed, second, saved)
    take_steps(straight, optimizer, 2)
    take_steps(resumed, second, 2)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_state_before_the_first_step_is_empty():
    model = Tied()
    optimizer = build_optimizer(model, AdamWConfig(), torch.device("cpu"))
    assert optimizer_tensors(model, optimizer) == {}
    load_optimizer_tensors(model, optimizer, {})
    take_steps(model, optimizer, 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"exp_avg/nobody.weight": torch.zeros(2)}, "exp_avg/nobody.weight' belongs to no trained parameter"),
        ({"exp_avg/frozen.weight": torch.zeros(4, 4)}, "frozen.weight' belongs to no trained parameter"),
        ({"exp_avg/up.weight": torch.zeros(2, 2)}, r"has shape \(2, 2\), the parameter \(6, 4\)"),
    ],
)
def test_state_of_another_model_is_refused(tensors, message):
    model = Tied()
    with pytest.raises(ValueError, match=message):
        load_optimizer_tensors(model, build_optimizer(model, AdamWConfig(), torch.device("cpu")), tensors)


def test_update_where_the_condition_holds_and_nothing_where_not():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, AdamWConfig(lr=0.1), torch.device("cpu"))
    model(torch.ones(1, 3)).sum().backward()
    plain = copy.deepcopy(model)
    plain_optimizer = build_optimizer(plain, AdamWConfig(lr=0.1), torch.device("cpu"))
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        other.grad = own.grad.clone()
    for _ in range(2):
        update_if(optimizer, torch.tensor(True))
        plain_optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
    update_if(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    plain_optimizer.step()
    optimizer.step()  # nothing is left of the condition
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
