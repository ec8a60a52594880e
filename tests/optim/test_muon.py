"""Muon, NorMuon and CautiousAdamW against their definitions in float64, packed and unpacked; resume; skipped steps."""

import pytest
import torch

from fusedlm.config.train import (
    AdamWConfig,
    MuonAdamWConfig,
    MuonConfig,
    NorMuonAdamWConfig,
    NorMuonConfig,
    RestConfig,
)
from fusedlm.nn.module import Constant, Module, Normal, Role, init_weights
from fusedlm.ops.polar.schemes import SCHEMES
from fusedlm.optim import build_optimizer, optimizer_split, optimizer_tensors, set_learning_rates, stacks, step_if
from fusedlm.optim.stacks import parts_of, stacked

CPU = torch.device("cpu")
DIM, STEPS = 6, 20
# Rows of the matrices that q, k, v and the experts' gate and up hold, in the order of the packed parameters.
PARTS = {"q": 8, "k": 4, "v": 4}
EXPERT_PARTS = {"gate": 5, "up": 5}
N_EXPERTS = 2


class Packed(Module):
    """Packed projections, a stack of packed experts, and parameters for AdamW, one of them decayed."""

    def __init__(self):
        super().__init__()
        rows, expert_rows = sum(PARTS.values()), sum(EXPERT_PARTS.values())
        self.add_parameter("qkv", (rows, DIM), Role("matrix", DIM, rows, tuple(PARTS.items())), Normal(1.0))
        role = Role("matrix", DIM, expert_rows, tuple(EXPERT_PARTS.items()))
        self.add_parameter("experts", (N_EXPERTS, expert_rows, DIM), role, Normal(1.0))
        self.add_parameter("router", (3, DIM), Role("router", DIM, 3), Normal(1.0))
        self.add_parameter("gain", (DIM,), Role("gain"), Constant(1.0))
        init_weights(self, seed=0)
        self.double()

    def matrices(self) -> dict[str, torch.Tensor]:
        """The single matrices of the packed parameters, as views."""
        found = dict(zip(PARTS, self.qkv.detach().split(list(PARTS.values())), strict=True))
        for e, expert in enumerate(self.experts.detach()):
            parts = expert.split(list(EXPERT_PARTS.values()))
            found |= {f"{name}{e}": part for name, part in zip(EXPERT_PARTS, parts, strict=True)}
        return found

    def set_gradients(self, gradients: dict[str, torch.Tensor]) -> None:
        self.qkv.grad = torch.cat([gradients[name] for name in PARTS])
        experts = [torch.cat([gradients[f"{name}{e}"] for name in EXPERT_PARTS]) for e in range(N_EXPERTS)]
        self.experts.grad = torch.stack(experts)
        self.router.grad, self.gain.grad = gradients["router"], gradients["gain"]


class Unpacked(Module):
    """The same matrices as parameters of their own."""

    def __init__(self):
        super().__init__()
        packed = Packed()
        for name, value in packed.matrices().items():
            self.add_parameter(name, tuple(value.shape), Role("matrix", DIM, len(value)), Constant(0.0))
        self.add_parameter("router", (3, DIM), Role("router", DIM, 3), Constant(0.0))
        self.add_parameter("gain", (DIM,), Role("gain"), Constant(1.0))
        self.double()
        with torch.no_grad():
            for name, value in (packed.matrices() | {"router": packed.router, "gain": packed.gain}).items():
                getattr(self, name).copy_(value)

    def matrices(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if name not in ("router", "gain")}

    def set_gradients(self, gradients: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.grad = gradients[name]


def gradients_at(step: int) -> dict[str, torch.Tensor]:
    """Of the single matrices and of the rest; in some steps those of one matrix, or of one row, are zero."""
    generator = torch.Generator().manual_seed(step)
    shapes = {name: tuple(x.shape) for name, x in Packed().matrices().items()} | {"router": (3, DIM), "gain": (DIM,)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    found["k"] *= step % 3 > 0
    found["gate1"][2] *= step % 2
    return found


def polar(u, scheme: str):
    """The definition of each scheme: odd polynomials after a scaling, on the shorter side."""
    settings = SCHEMES[scheme]
    u = u / (settings.safety * (u**2).sum() ** 0.5 + settings.eps)
    tall = u.shape[0] > u.shape[1]
    u = u.T if tall else u
    if settings.preconditioned:
        sums = (u @ u.T).abs().sum(1, keepdim=True)
        u = torch.where(sums > 0, u / sums**0.5, 0.0)
    for a, b, c in settings.coefficients:
        u = a * u + b * (u @ u.T @ u) + c * (u @ u.T @ u @ u.T @ u)
    return u.T if tall else u


def muon_by_hand(w, gradients, lr_scales, config, beta2=None):
    m, v = torch.zeros_like(w), torch.zeros_like(w[:, :1])
    n_out, n_in = w.shape
    scaling = {
        "shape": max(1, n_out / n_in) ** 0.5,
        "spectral": (n_out / n_in) ** 0.5,
        "rms": 0.2 * max(n_out, n_in) ** 0.5,
    }[config.scaling]
    for g, lr_scale in zip(gradients, lr_scales, strict=True):
        m = config.momentum * m + (1 - config.momentum) * g
        u = config.momentum * m + (1 - config.momentum) * g if config.nesterov else m
        o = polar(u, config.scheme)
        if beta2 is not None:
            v = beta2 * v + (1 - beta2) * (o**2).mean(1, keepdim=True)
            normalised = o / (v**0.5 + 1e-8)
            o = normalised * ((o**2).sum() / (normalised**2).sum()) ** 0.5 if o.any() else o
        u = scaling * o
        decayed = w * (u * w >= 0) if config.cautious else w
        w = w - config.lr * lr_scale * (u + config.weight_decay * decayed)
    return w


def adamw_by_hand(w, gradients, lr_scales, config, decay):
    m = v = torch.zeros_like(w)
    for step, (g, lr_scale) in enumerate(zip(gradients, lr_scales, strict=True), start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        u = (m / (1 - config.beta1**step)) / ((v / (1 - config.beta2**step)) ** 0.5 + config.eps)
        decayed = w * (u * w >= 0) if config.cautious else w
        w = w - config.lr * lr_scale * (u + decay * decayed)
    return w


REST = RestConfig(lr=0.03, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.4, cautious=True)
MUON = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9}
CONFIGS = {
    "muon": MuonAdamWConfig(matrix=MuonConfig(**MUON), rest=REST),
    "muon, cautious, shape, quintic": MuonAdamWConfig(
        matrix=MuonConfig(**MUON, cautious=True, scaling="shape", scheme="quintic"), rest=REST
    ),
    "muon, rms, turbo, no nesterov": MuonAdamWConfig(
        matrix=MuonConfig(**MUON, scaling="rms", scheme="turbo", nesterov=False), rest=RestConfig(weight_decay=0.1)
    ),
    "normuon": NorMuonAdamWConfig(matrix=NorMuonConfig(**MUON, beta2=0.7), rest=REST),
    "normuon, cautious": NorMuonAdamWConfig(matrix=NorMuonConfig(**MUON, cautious=True), rest=REST),
}


def trained(model, config, steps: int = STEPS):
    optimizer = build_optimizer(model, config, CPU)
    for step in range(steps):
        model.set_gradients(gradients_at(step))
        set_learning_rates(optimizer, (step + 1) / STEPS)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_twenty_steps_by_hand_packed_and_unpacked(config):
    start, scales = Packed(), [(step + 1) / STEPS for step in range(STEPS)]
    gradients = {name: [gradients_at(step)[name] for step in range(STEPS)] for name in gradients_at(0)}
    beta2 = getattr(config.matrix, "beta2", None)
    expected = {
        name: muon_by_hand(w.clone(), gradients[name], scales, config.matrix, beta2)
        for name, w in start.matrices().items()
    }
    expected["router"] = adamw_by_hand(
        start.router.detach(), gradients["router"], scales, config.rest, config.rest.weight_decay
    )
    expected["gain"] = adamw_by_hand(start.gain.detach(), gradients["gain"], scales, config.rest, 0.0)
    for model in (Packed(), Unpacked()):
        trained(model, config)
        found = model.matrices() | {"router": model.router.detach(), "gain": model.gain.detach()}
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cautious", [False, True])
def test_adamw_by_hand(cautious):
    config = AdamWConfig(lr=0.05, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, cautious=cautious)
    model, start, scales = Packed(), Packed(), [(step + 1) / STEPS for step in range(STEPS)]
    trained(model, config)
    gradients = [gradients_at(step) for step in range(STEPS)]
    for name, decay in (("router", 0.3), ("gain", 0.0)):
        w = adamw_by_hand(getattr(start, name).detach(), [g[name] for g in gradients], scales, config, decay)
        torch.testing.assert_close(getattr(model, name).detach(), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("type", "matrices"), [(MuonAdamWConfig, "muon"), (NorMuonAdamWConfig, "normuon")])
def test_the_split_is_by_role(type, matrices):
    optimizer = build_optimizer(Packed(), type(), CPU)
    assert optimizer_split(optimizer) == {
        matrices: ["qkv", "experts"],
        "adamw, decayed": ["router"],
        "adamw, not decayed": ["gain"],
    }


def test_parameters_that_no_group_takes_are_errors():
    model = Packed()
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="parameter stray has no role"):
        build_optimizer(model, NorMuonAdamWConfig(), CPU)

    class Vector(Module):
        def __init__(self):
            super().__init__()
            self.add_parameter("weight", (4,), Role("matrix", 4, 1), Constant(0.0))

    with pytest.raises(ValueError, match=r"a hidden matrix of shape \(4,\): must be \(out, in\) or"):
        build_optimizer(Vector(), MuonAdamWConfig(), CPU)
    with pytest.raises(ValueError, match="do not sum to the 4 rows"):
        parts_of(torch.nn.Parameter(torch.zeros(4, 2)), (("a", 2), ("b", 1)))


def test_a_parameter_without_a_gradient_stays():
    model, config = Packed(), NorMuonAdamWConfig()
    optimizer = build_optimizer(model, config, CPU)
    before = model.qkv.detach().clone(), model.experts.detach().clone()
    model.set_gradients(gradients_at(1))
    model.qkv.grad = None
    optimizer.step()
    assert torch.equal(model.qkv, before[0]) and not torch.equal(model.experts, before[1])
    assert not optimizer.state[model.qkv]


def test_a_rate_in_a_tensor_changes_in_place():
    """As a captured CUDA graph reads it."""
    model, plain = Packed(), Packed()
    config = NorMuonAdamWConfig(rest=RestConfig(cautious=True, weight_decay=0.1))
    optimizers = [build_optimizer(one, config, CPU) for one in (model, plain)]
    rates = [torch.tensor(group["lr"], dtype=torch.float64) for group in optimizers[0].param_groups]
    for group, rate in zip(optimizers[0].param_groups, rates, strict=True):
        group["lr"] = rate
    for step in range(2):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            one.set_gradients(gradients_at(step))
            set_learning_rates(optimizer, 0.5 / (step + 1))
            optimizer.step()
    assert [float(rate) for rate in rates] == [group["lr"] for group in optimizers[1].param_groups]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=0, atol=1e-15)


def test_skipped_steps_leave_no_trace():
    config = NorMuonAdamWConfig(rest=RestConfig(cautious=True, weight_decay=0.1))
    model, plain = Packed(), Packed()
    optimizer, other = build_optimizer(model, config, CPU), build_optimizer(plain, config, CPU)
    for step in range(3):
        model.set_gradients({name: g * float("nan") for name, g in gradients_at(step).items()})
        step_if(optimizer, torch.tensor(False))
        for one, its in ((model, optimizer), (plain, other)):
            one.set_gradients(gradients_at(step))
            step_if(its, torch.tensor(True))
    found, expected = optimizer_tensors(model, optimizer), optimizer_tensors(plain, other)
    assert found.keys() == expected.keys() and {name.split("/")[0] for name in found} == {
        "momentum", "row_square", "exp_avg", "exp_avg_sq", "step",
    }  # fmt: skip
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_stacks_are_cut_where_they_become_too_large(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((5, 4, 3), (4, 3), (2, 3))]
    parts = [part for parameter in parameters for part in parts_of(parameter, ())]
    assert [len(stack.parts) for stack in stacked(parts)] == [6, 1]
    monkeypatch.setattr(stacks, "_LARGEST", 2 * 4 * 3 + 1)
    found = stacked(parts)
    assert [len(stack.parts) for stack in found] == [2, 2, 2, 1]
    assert [part for stack in found for part in stack.parts] == parts
    monkeypatch.setattr(stacks, "_LARGEST", 1)
    assert [len(stack.parts) for stack in stacked(parts)] == [1] * 7, "a matrix is not cut"
