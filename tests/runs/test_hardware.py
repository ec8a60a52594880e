"""Peak FLOP/s, memory, the environment record, and torch's global switches."""

import pytest
import torch

from fusedlm.runs.hardware import environment, numerics, peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("Tesla K80", None),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_device(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_the_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_peak_memory_is_in_bytes():
    assert 10e6 < peak_memory_bytes(torch.device("cpu")) < 1e12


def test_the_environment_names_versions_and_hardware():
    found = environment(torch.device("cpu"), torch.bfloat16)
    assert found["torch"] == torch.__version__
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16")
    assert found["device_name"] and found["cpu_count"] >= 1


def test_switches_are_set_inside_and_restored_outside():
    cuda = torch.device("cuda")
    with numerics(cuda, torch.bfloat16, deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        with numerics(cuda, torch.float32, deterministic=False):
            assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.deterministic
