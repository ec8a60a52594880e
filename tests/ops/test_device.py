"""Which kernels are launched by programmatic dependent launch (PDL)."""

import pytest
import torch

from fusedlm.ops.common.device import pdl_options, supports_pdl

cross_entropy = pytest.importorskip("fusedlm.ops.cross_entropy.triton")
differential = pytest.importorskip("fusedlm.ops.differential.triton")
norm_linear = pytest.importorskip("fusedlm.ops.norm_linear.triton")
sums = pytest.importorskip("fusedlm.ops.common.sums")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, hip, supported", [((8, 9), None, False), ((9, 0), None, True), ((9, 4), "6", False)]
)
def test_hopper_and_later_support_pdl(capability, hip, supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert supports_pdl(CUDA) == supported and not supports_pdl(CPU)
    assert pdl_options(CUDA) == {"PDL": supported} | ({"launch_pdl": True} if supported else {})
    assert pdl_options(CPU) == {"PDL": False}


class _Launches:
    """Stands in for a kernel. `made`: for each launch, whether the kernel waits and whether it is launched by PDL."""

    def __init__(self):
        self.made = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.made.append((options["PDL"], options.get("launch_pdl", False)))


def _on_hopper(module, monkeypatch):
    options = {"PDL": True, "launch_pdl": True}
    for name, answer in (("supports_pdl", True), ("pdl_options", options)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda device, answer=answer: answer)


@pytest.mark.parametrize("width, kernel", [(40, "full_rows_kernel"), (5000, "loss_and_gradient_kernel")])
@pytest.mark.parametrize("mean", [True, False])
def test_a_loss_uses_pdl_only_after_the_count_of_targets(width, kernel, mean, monkeypatch):
    """After another kernel its logits may not have been written yet."""
    _on_hopper(cross_entropy, monkeypatch)
    launches = {name: _Launches() for name in (kernel, "count_kernel", "partial_sums_kernel", "total_kernel")}
    for name, stand_in in launches.items():
        monkeypatch.setattr(cross_entropy.kernels, name, stand_in)
    logits, targets = torch.zeros(3, width, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    cross_entropy.softcap_cross_entropy(logits, targets, 15.0, width, reduction="mean" if mean else "sum")
    assert launches["count_kernel"].made == [(True, False)] * mean
    assert launches[kernel].made == [(True, mean)]
    assert launches["partial_sums_kernel"].made == launches["total_kernel"].made == [(True, True)]


def test_short_rows_without_a_gradient_do_not_use_pdl(monkeypatch):
    _on_hopper(cross_entropy, monkeypatch)
    monkeypatch.setattr(cross_entropy.kernels, "full_rows_kernel", kernel := _Launches())
    cross_entropy.softcap_cross_entropy(torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64), 15.0, 40)
    assert kernel.made == [(False, False)]


@pytest.mark.parametrize("n", [2, 32])
def test_the_projection_of_a_few_tokens_uses_pdl(n, monkeypatch):
    _on_hopper(norm_linear, monkeypatch)
    monkeypatch.setattr(norm_linear, "_normalise_kernel", norm := _Launches())
    monkeypatch.setattr(norm_linear, "_few_tokens_kernel", projection := _Launches())
    norm_linear.packed_rmsnorm_linear(torch.zeros(n, 16), torch.ones(16), torch.zeros(24, 16), 1e-6)
    assert norm.made == [(True, False)] and projection.made == [(True, True)]


def test_the_final_reduction_of_partial_gradients_uses_pdl(monkeypatch):
    _on_hopper(differential, monkeypatch)
    _on_hopper(sums, monkeypatch)
    monkeypatch.setattr(differential, "_backward_kernel", backward := _Launches())
    monkeypatch.setattr(sums, "_column_sums_kernel", reduction := _Launches())
    heads, weight, gamma = torch.zeros(1, 4, 2, 8), torch.zeros(2), torch.ones(8)
    torch.ops.fusedlm.differential_combine_backward(heads, heads.clone(), heads.clone(), weight, gamma, None, 1e-6)
    assert backward.made == [(True, False)] and reduction.made == [(True, True)]
