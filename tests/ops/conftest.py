import pytest
import torch


def _poisoning(make):
    def poison(*size, **rest):
        out = make(*size, **rest)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    return poison


@pytest.fixture
def poisoned(monkeypatch):
    """Allocations are filled with NaN, or with the lowest integer."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
