"""Optimizers: groups by role, the published updates, learning rates, conditional steps, and saved state."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedlm.config.train import AdamWConfig, MuonAdamWConfig, NorMuonAdamWConfig, RestConfig, SGDConfig
from fusedlm.nn.module import Constant, Module, Normal, Role, init_weights
from fusedlm.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_bytes,
    optimizer_tensors,
    parameter_groups,
    set_learning_rates,
    step_if,
)
from fusedlm.testing import part_model

CPU = torch.device("cpu")


class Small(Module):
    """A matrix, a gain and a frozen matrix; every step sees another gradient."""

    def __init__(self):
        super().__init__()
        self.add_parameter("matrix", (3, 4), Role("matrix"), Normal(1.0))
        self.add_parameter("gain", (4,), Role("gain"), Constant(1.0))
        self.add_parameter("frozen", (4, 4), Role("matrix"), Normal(1.0))
        self.frozen.requires_grad_(False)
        init_weights(self, seed=0)

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in (self.matrix, self.gain):
            parameter.grad = torch.randn(parameter.shape, generator=generator)


class Odd(torch.optim.Optimizer):
    """Keeps state of several shapes and dtypes, all of which the update reads."""

    def __init__(self, parameters, lr: float = 0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["count"] = torch.zeros((), dtype=torch.int64)
                    state["table"] = torch.zeros(3, 5, dtype=torch.bfloat16)
                    state["was_positive"] = torch.zeros(1, 1, 2, dtype=torch.bool)
                    state["empty"] = torch.zeros(0, 7)
                    state["not yet"] = None
                state["count"] += 1
                state["table"] += parameter.grad.sum().bfloat16()
                scale = state["count"] + state["table"].float().mean() + state["was_positive"].sum()
                state["was_positive"] |= parameter.grad.sum() > 0
                parameter.add_(parameter.grad, alpha=-group["lr"] * float(scale))


def adamw(model):
    return build_optimizer(model, AdamWConfig(lr=0.01), CPU)


def sgd(model):
    return build_optimizer(model, SGDConfig(), CPU)


def cautious(model):
    return build_optimizer(model, AdamWConfig(lr=0.01, cautious=True), CPU)


def muon(model):
    return build_optimizer(model, MuonAdamWConfig(rest=RestConfig(cautious=True, weight_decay=0.1)), CPU)


def normuon(model):
    return build_optimizer(model, NorMuonAdamWConfig(), CPU)


def odd(model):
    return Odd(parameter_groups(model, 0.0))


EVERY_OPTIMIZER = pytest.mark.parametrize("build", [adamw, cautious, sgd, muon, normuon, odd])


def names(model, group):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(by_id[id(parameter)] for parameter in group["params"])


def snapshot(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of parameters and state."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: tensor.clone() for name, tensor in (tensors | optimizer_tensors(model, optimizer)).items()}


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def test_only_hidden_matrices_and_routers_are_decayed():
    model = part_model(
        "{type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}", "{type: routed, hidden: 32}", extra="n_layers: 1"
    )
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == [
        "blocks.0.ffn.light.down.weight",
        "blocks.0.ffn.light.gate_up.weight",
        "blocks.0.ffn.rest.down.weight",
        "blocks.0.ffn.rest.gate_up.weight",
        "blocks.0.ffn.router.weight",
        "blocks.0.mixer.down.weight",
        "blocks.0.mixer.kv_up.weight",
        "blocks.0.mixer.out.weight",
        "blocks.0.mixer.q_up.weight",
    ]


def test_lambda_convolution_and_an_untied_head_are_not_decayed():
    """Whatever their shape: all of these have two or more dimensions."""
    for mixer, name in (
        ("{type: cmd_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}", "blocks.1.mixer.lambda_q"),
        ("{type: gdn, n_heads: 2}", "blocks.1.mixer.conv.weight"),
        ("{type: gdn, n_heads: 2}", "head.weight"),
        ("{type: gdn, n_heads: 2}", "embedding.weight"),
    ):
        model = part_model(mixer, extra="tie_embeddings: false")
        decayed, kept = parameter_groups(model, 0.1)
        assert name in names(model, kept) and name not in names(model, decayed)
        assert "blocks.1.mixer.out.weight" in names(model, decayed)


def test_shared_parameters_count_once_and_frozen_ones_not_at_all():
    model = part_model("{type: attention, n_heads: 2}")
    assert model.head.weight is model.embedding.weight
    assert sum(names(model, group).count("embedding.weight") for group in parameter_groups(model, 0.1)) == 1
    small = Small()
    assert [names(small, group) for group in parameter_groups(small, 0.1)] == [["matrix"], ["gain"]]


def test_a_model_without_matrices_has_one_group():
    small = Small()
    small.matrix.requires_grad_(False)
    assert [names(small, group) for group in parameter_groups(small, 0.1)] == [["gain"]]


def test_a_parameter_without_a_role_is_an_error():
    with pytest.raises(ValueError, match="parameter weight has no role"):
        parameter_groups(torch.nn.Linear(2, 2, bias=False), 0.1)


def test_adamw_steps_by_hand():
    """arXiv 1711.05101, algorithm 2, in float64, with decay of the matrix alone."""
    lr, beta1, beta2, eps, decay = 0.1, 0.6, 0.8, 0.01, 0.5
    model = Small()
    config = AdamWConfig(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    optimizer = build_optimizer(model, config, CPU)
    weights = {"matrix": model.matrix.detach().double(), "gain": model.gain.detach().double()}
    m = v = {"matrix": 0.0, "gain": 0.0}
    for step in range(1, 4):
        model.set_gradients(step)
        gradients = {name: getattr(model, name).grad.double() for name in weights}
        m = {name: beta1 * m[name] + (1 - beta1) * gradient for name, gradient in gradients.items()}
        v = {name: beta2 * v[name] + (1 - beta2) * gradient**2 for name, gradient in gradients.items()}
        for name, decay_of in (("matrix", decay), ("gain", 0.0)):
            update = (m[name] / (1 - beta1**step)) / ((v[name] / (1 - beta2**step)).sqrt() + eps)
            weights[name] = weights[name] - lr * decay_of * weights[name] - lr * update
        optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(getattr(model, name).double(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_by_hand(nesterov):
    lr, momentum, decay = 0.1, 0.7, 0.5
    model = Small()
    config = SGDConfig(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    optimizer = build_optimizer(model, config, CPU)
    weights = {"matrix": model.matrix.detach().double(), "gain": model.gain.detach().double()}
    velocity = {"matrix": 0.0, "gain": 0.0}
    for step in range(3):
        model.set_gradients(step)
        for name, decay_of in (("matrix", decay), ("gain", 0.0)):
            gradient = getattr(model, name).grad.double() + decay_of * weights[name]
            velocity[name] = momentum * velocity[name] + gradient
            direction = gradient + momentum * velocity[name] if nesterov else velocity[name]
            weights[name] = weights[name] - lr * direction
        optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(getattr(model, name).double(), weight, rtol=0, atol=1e-6)


def test_learning_rates_are_multiples_of_each_groups_peak():
    model = Small()
    optimizer = torch.optim.SGD([{"params": [model.matrix], "lr": 0.5}, {"params": [model.gain]}], lr=0.1)
    for scale in (0.1, 1.0, 0.25):
        set_learning_rates(optimizer, scale)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5 * scale, 0.1 * scale])
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    before = model.matrix.detach().clone(), model.gain.detach().clone()
    model.set_gradients(0)
    optimizer.step()
    torch.testing.assert_close(before[0] - model.matrix, 0.125 * model.matrix.grad)
    torch.testing.assert_close(before[1] - model.gain, 0.025 * model.gain.grad)


@EVERY_OPTIMIZER
def test_a_step_whose_condition_is_false_changes_neither_parameters_nor_state(build):
    model, plain = Small(), Small()
    optimizer, plain_optimizer = build(model), build(plain)
    for step in range(3):
        for one in (model, plain):
            one.set_gradients(step)
        step_if(optimizer, torch.tensor(True))
        plain_optimizer.step()
        before = snapshot(model, optimizer)
        assert_identical(before, snapshot(plain, plain_optimizer))
        model.set_gradients(step + 100)
        model.matrix.grad[0, 0] = float("nan")
        step_if(optimizer, torch.tensor(False))
        assert_identical(snapshot(model, optimizer), before)
    assert optimizer_tensors(model, optimizer)


@EVERY_OPTIMIZER
def test_a_skipped_first_step_leaves_no_trace(build):
    model, plain = Small(), Small()
    optimizer, plain_optimizer = build(model), build(plain)
    model.set_gradients(7)
    model.gain.grad.fill_(float("inf"))
    step_if(optimizer, torch.tensor(False))
    for step in range(2):
        for one, its in ((model, optimizer), (plain, plain_optimizer)):
            one.set_gradients(step)
            its.step()  # not skipped
    assert_identical(snapshot(model, optimizer), snapshot(plain, plain_optimizer))


@EVERY_OPTIMIZER
def test_saved_state_resumes_bit_for_bit(build, tmp_path):
    straight = Small()
    optimizer = build(straight)
    for step in range(3):
        straight.set_gradients(step)
        optimizer.step()
    save_file(optimizer_tensors(straight, optimizer), tmp_path / "optimizer.safetensors")
    resumed = Small()
    resumed.load_state_dict(straight.state_dict())
    resumed_optimizer = build(resumed)
    resumed.set_gradients(50)
    resumed_optimizer.step()  # state that loading replaces
    resumed.load_state_dict(straight.state_dict())
    load_optimizer_tensors(resumed, resumed_optimizer, load_file(tmp_path / "optimizer.safetensors"))
    assert_identical(snapshot(resumed, resumed_optimizer), snapshot(straight, optimizer))
    for step in range(3, 6):
        for model, its in ((straight, optimizer), (resumed, resumed_optimizer)):
            model.set_gradients(step)
            its.step()
    assert_identical(snapshot(resumed, resumed_optimizer), snapshot(straight, optimizer))


def test_state_of_any_shape_and_dtype_is_saved():
    model = Small()
    optimizer = odd(model)
    model.set_gradients(0)
    optimizer.step()
    saved = optimizer_tensors(model, optimizer)
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items() if name.endswith("/gain")}
    assert kinds == {
        "count/gain": ((), torch.int64),
        "table/gain": ((3, 5), torch.bfloat16),
        "was_positive/gain": ((1, 1, 2), torch.bool),
        "empty/gain": ((0, 7), torch.float32),
    }
    assert len(saved) == 8


def test_loading_copies_the_tensors():
    model = Small()
    optimizer = adamw(model)
    model.set_gradients(0)
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    load_optimizer_tensors(model, optimizer, saved)
    optimizer.step()
    assert_identical(saved, kept)


def test_state_before_the_first_step_is_empty():
    model = Small()
    optimizer = adamw(model)
    assert optimizer_tensors(model, optimizer) == {}
    load_optimizer_tensors(model, optimizer, {})
    model.set_gradients(0)
    optimizer.step()
    assert {tensor.item() for name, tensor in optimizer_tensors(model, optimizer).items() if "step/" in name} == {1.0}


@pytest.mark.parametrize("name", ["exp_avg/nothing", "exp_avg/frozen", "exp_avg"])
def test_state_of_another_model_is_refused(name):
    model = Small()
    with pytest.raises(ValueError, match=f"'{name}' belongs to no trainable parameter"):
        load_optimizer_tensors(model, adamw(model), {name: torch.zeros(2)})


def test_state_that_is_no_tensor_is_refused():
    model = Small()
    optimizer = adamw(model)
    optimizer.state[model.gain]["history"] = [1, 2]
    with pytest.raises(TypeError, match="optimizer state history/gain is a list, not a tensor"):
        optimizer_tensors(model, optimizer)


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(),
        SGDConfig(),
        SGDConfig(momentum=0.0),
        SGDConfig(nesterov=True),
        MuonAdamWConfig(),
        NorMuonAdamWConfig(),
    ],
    ids=repr,
)
def test_predicted_bytes_are_those_of_the_state_after_a_step(config):
    model = part_model("{type: attention, n_heads: 2}")
    optimizer = build_optimizer(model, config, CPU)
    tokens = torch.arange(12).view(2, 6)
    model(tokens, targets=tokens).total().backward()
    optimizer.step()
    state = optimizer_tensors(model, optimizer)
    found = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("step/"))
    assert found == optimizer_bytes(config, model)


@pytest.mark.gpu
def test_state_returns_to_the_gpu(tmp_path):
    """Fused AdamW reads its step counters on the device."""
    device = torch.device("cuda")
    straight, resumed = Small().to(device), Small().to(device)
    optimizer, resumed_optimizer = (build_optimizer(m, AdamWConfig(lr=0.01), device) for m in (straight, resumed))
    for parameter in (straight.matrix, straight.gain):
        parameter.grad = torch.ones_like(parameter)
    step_if(optimizer, torch.tensor(True, device=device))
    save_file(optimizer_tensors(straight, optimizer), tmp_path / "optimizer.safetensors")
    load_optimizer_tensors(resumed, resumed_optimizer, load_file(tmp_path / "optimizer.safetensors"))
    resumed.load_state_dict(straight.state_dict())
    for model, its in ((straight, optimizer), (resumed, resumed_optimizer)):
        for parameter in (model.matrix, model.gain):
            parameter.grad = torch.full_like(parameter, 2.0)
        step_if(its, torch.tensor(True, device=device))
        step_if(its, torch.tensor(False, device=device))
    assert_identical(snapshot(resumed, resumed_optimizer), snapshot(straight, optimizer))
