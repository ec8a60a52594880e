import contextlib

import pytest
import torch


@pytest.fixture(autouse=True)
def transformers_is_quiet(monkeypatch):
    """No search for kernels on a hub, no progress bars."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def in_float64(monkeypatch):
    """A context in which code that widens to float32 by name widens to float64."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield

    return context
