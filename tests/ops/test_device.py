"""Which kernels are launched before the one in front of them ends."""

import pytest
import torch

from fusedlm.ops.common import device as asked

softcap = pytest.importorskip("fusedlm.ops.softcap_cross_entropy.triton")
combine = pytest.importorskip("fusedlm.ops.differential_combine.triton")
projection = pytest.importorskip("fusedlm.ops.rmsnorm_linear.triton")
sums = pytest.importorskip("fusedlm.ops.common.sums")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, hip, overlaps", [((8, 9), None, False), ((9, 0), None, True), ((9, 4), "6", False)]
)
def test_launched_early_from_hopper_on(capability, hip, overlaps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert asked.overlaps(CUDA) == overlaps and not asked.overlaps(CPU)
    assert asked.launched_early(CUDA) == {"OVERLAPPED": overlaps} | ({"launch_pdl": True} if overlaps else {})
    assert asked.launched_early(CPU) == {"OVERLAPPED": False}


class _Launches:
    """Stands for a kernel, and remembers whether it was launched early and must wait."""

    def __init__(self):
        self.made = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.made.append((options["OVERLAPPED"], options.get("launch_pdl", False)))


def _on_hopper(module, monkeypatch):
    options = {"OVERLAPPED": True, "launch_pdl": True}
    for name, answer in (("overlaps", True), ("launched_early", options)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda device, answer=answer: answer)


@pytest.mark.parametrize("width, rows_kernel", [(40, "whole_rows_kernel"), (5000, "both_kernel")])
@pytest.mark.parametrize("mean", [True, False])
def test_a_loss_is_launched_early_behind_its_count_alone(width, rows_kernel, mean, monkeypatch):
    """Behind anything else its logits need not be there yet."""
    _on_hopper(softcap, monkeypatch)
    launches = {name: _Launches() for name in (rows_kernel, "count_kernel", "sums_kernel", "total_kernel")}
    for name, kernel in launches.items():
        monkeypatch.setattr(softcap.kernels, name, kernel)
    logits, targets = torch.zeros(3, width, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    softcap.softcap_cross_entropy(logits, targets, 15.0, width, reduction="mean" if mean else "sum")
    assert launches["count_kernel"].made == [(True, False)] * mean
    assert launches[rows_kernel].made == [(True, mean)]
    assert launches["sums_kernel"].made == launches["total_kernel"].made == [(True, True)]


def test_narrow_rows_without_a_gradient_are_not(monkeypatch):
    _on_hopper(softcap, monkeypatch)
    monkeypatch.setattr(softcap.kernels, "whole_rows_kernel", kernel := _Launches())
    softcap.softcap_cross_entropy(torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64), 15.0, 40)
    assert kernel.made == [(False, False)]


@pytest.mark.parametrize("n", [2, 32])
def test_the_projection_of_a_few_tokens_is(n, monkeypatch):
    _on_hopper(projection, monkeypatch)
    monkeypatch.setattr(projection, "_normalise_kernel", norm := _Launches())
    monkeypatch.setattr(projection, "_few_rows_kernel", product := _Launches())
    projection.packed_rmsnorm_linear(torch.zeros(n, 16), torch.ones(16), torch.zeros(24, 16), 1e-6)
    assert norm.made == [(True, False)] and product.made == [(True, True)]


def test_the_end_of_a_gradient_is(monkeypatch):
    _on_hopper(combine, monkeypatch)
    _on_hopper(sums, monkeypatch)
    monkeypatch.setattr(combine, "_backward_kernel", parts := _Launches())
    monkeypatch.setattr(sums, "_column_sums_kernel", end := _Launches())
    heads, weight, gamma = torch.zeros(1, 4, 2, 8), torch.zeros(2), torch.ones(8)
    torch.ops.fusedlm.differential_combine_backward(heads, heads.clone(), heads.clone(), weight, gamma, None, 1e-6)
    assert parts.made == [(True, False)] and end.made == [(True, True)]
