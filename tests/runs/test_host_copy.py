"""Copies in memory that is used again."""

import pytest
import torch

from fusedlm.runs import host_copy
from fusedlm.runs.host_copy import HostCopy

TENSORS = [
    torch.arange(6.0).reshape(2, 3).T,
    torch.tensor(3, dtype=torch.int64),
    torch.zeros(0, 2),
    torch.tensor([True, False, True]),
    torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
    torch.arange(100, dtype=torch.float64),
]


def test_copies_are_equal_contiguous_and_independent(monkeypatch):
    monkeypatch.setattr(host_copy, "_BLOCK_BYTES", 256)  # so that some tensors share a block, and one has its own
    copy, tensors = HostCopy(pinned=False), [tensor.detach().clone() for tensor in TENSORS]
    for _ in range(2):
        copies = copy.take(tensors)
        for found, tensor in zip(copies, tensors, strict=True):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)
            assert found.is_contiguous() and not found.requires_grad
        before = [found.clone() for found in copies]
        for tensor in tensors:
            tensor.zero_()
        assert all(map(torch.equal, copies, before))
    places = {found.data_ptr() for found in copies if found.numel()}
    assert len(places) == 5 and all(place % 64 == 0 for place in places)


def test_the_memory_is_allocated_once():
    copy = HostCopy(pinned=False)
    first = [found.data_ptr() for found in copy.take(TENSORS)]
    assert [found.data_ptr() for found in copy.take(TENSORS)] == first
    more = copy.take([*TENSORS, torch.ones(50)])
    assert [found.data_ptr() for found in more][:-1] == first and torch.equal(more[-1], torch.ones(50))
    assert len(copy._blocks) == 2


def test_memory_that_cannot_be_pinned_is_ordinary(monkeypatch):
    empty, asked = torch.empty, []

    def refused(*arguments, pin_memory=False, **options):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refused)
    assert torch.equal(HostCopy(pinned=True).take([torch.ones(3)])[0], torch.ones(3))
    assert asked == [True, False]


@pytest.mark.gpu
def test_pinned_copies_of_a_gpu_are_complete_on_return():
    copy, tensors = HostCopy(pinned=True), [torch.randn(1 << 22, device="cuda") for _ in range(4)]
    for _ in range(2):
        expected = [tensor.cpu() for tensor in tensors]
        copies = copy.take(tensors)
        assert all(found.is_pinned() for found in copies) and all(map(torch.equal, copies, expected))
        for tensor in tensors:
            tensor.mul_(2)
        assert all(map(torch.equal, copies, expected))
