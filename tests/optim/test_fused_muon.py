"""The kernels of optimizer steps against the steps in plain PyTorch."""

import pytest
import torch

from fusedlm.config.train import AdamWConfig, NorMuonAdamWConfig
from fusedlm.optim import build_optimizer, optimizer_tensors, set_learning_rates
from fusedlm.testing import assert_close
from tests.optim.test_muon import CONFIGS, Packed, gradients_at

fused_muon = pytest.importorskip("fusedlm.optim.fused_muon")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch):
    """Kernels wherever they can run, in float32."""
    from fusedlm.optim import cautious_adamw, muon

    for module in (muon, cautious_adamw):
        monkeypatch.setattr(module, "can_run_triton", lambda tensor: tensor.dtype == torch.float32)


def steps(model, config, found: tuple[float, ...], lr_in_memory: bool = False):
    """Train on gradients that are those of `gradients_at`, but NaN where a step is skipped."""
    optimizer = build_optimizer(model, config, DEVICE, torch.float32)
    if lr_in_memory:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=DEVICE)
    dtype = model.qkv.dtype
    for step, found_inf in enumerate(found):
        gradients = {name: g.to(DEVICE, dtype) for name, g in gradients_at(step).items()}
        model.set_gradients({name: g * (float("nan") if found_inf else 1.0) for name, g in gradients.items()})
        set_learning_rates(optimizer, 1 / (step + 1))
        if dtype == torch.float64:
            if not found_inf:
                optimizer.step()
            continue
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf, device=DEVICE)
        optimizer.step()
        assert optimizer._step_supports_amp_scaling
    return {name: p.detach() for name, p in model.named_parameters()} | optimizer_tensors(model, optimizer)


def check(config, found=(1.0, 0.0, 0.0), bound: float = 1e-5, **options):
    """Steps that are taken or, where found_inf is not 0, skipped."""
    exact = steps(Packed().to(DEVICE), config, found)
    actual = steps(Packed().float().to(DEVICE), config, found, **options)
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        assert_close(actual[name].double(), value.double(), bound, name)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "," in name])
def test_steps_of_muon(name, kernels, poisoned):
    check(CONFIGS[name])


@pytest.mark.parametrize("lr_in_memory", [False, True])
def test_steps_of_cautious_adamw(lr_in_memory, kernels, poisoned):
    check(AdamWConfig(lr=0.05, weight_decay=0.3, cautious=True), lr_in_memory=lr_in_memory)


def test_rates_in_memory(kernels):
    check(CONFIGS["normuon"], lr_in_memory=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tiles this small are the interpreter's")
def test_several_tiles_and_padded_stacks(kernels, monkeypatch, poisoned):
    """Updates go to stacks of padded matrices, and from there to the kernels of products."""
    from fusedlm.ops.polar import triton as products

    monkeypatch.setattr(fused_muon, "_TILE", {"ROWS": 8, "COLUMNS": 4})
    monkeypatch.setattr(fused_muon, "_ROW_TILE", {"ROWS": 4, "COLUMNS": 4})
    monkeypatch.setattr(products, "ALIGNMENT", 16)
    monkeypatch.setattr(
        products, "_INTERPRETED", products._INTERPRETED | {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "SUBTILES": 1}
    )
    monkeypatch.setattr(fused_muon, "runs_kernel", lambda *sizes: True)
    check(NorMuonAdamWConfig(), found=(0.0,))


def test_gradients_of_any_strides(kernels):
    config, model, plain = NorMuonAdamWConfig(), Packed().float().to(DEVICE), Packed().float().to(DEVICE)
    for one in (model, plain):
        optimizer = build_optimizer(one, config, DEVICE, torch.float32)
        one.set_gradients({name: g.to(DEVICE, torch.float32) for name, g in gradients_at(1).items()})
        if one is model:
            for parameter in one.parameters():
                parameter.grad = parameter.grad.mT.contiguous().mT if parameter.grad.ndim > 1 else parameter.grad
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
