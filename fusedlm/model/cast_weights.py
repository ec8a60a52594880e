"""Weights in the precision of the products that decoding computes with them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fusedlm.nn.linear import Linear
from fusedlm.nn.lm_head import LMHead


class CastWeights:
    """Copies of a model's matrices in the dtype of autocast, which would cast each of them again at every step.

    Results are those of autocast, bit for bit: only weights of linear layers and of the head are copied, and a tied
    embedding is looked up in its own precision, as are routers, gains, biases and convolutions.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """dtype: of autocast; float32: nothing is copied."""
        self._copies: list[tuple[nn.Module, nn.Parameter]] = []
        if dtype == torch.float32:
            return
        for module in model.modules():
            if _is_cast_by_autocast(module) and module.weight.dtype == torch.float32:
                copy = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
                self._copies.append((module, copy))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The model has the copies in place of its own weights."""
        own = [(module, module._parameters["weight"]) for module, _ in self._copies]
        try:
            for module, copy in self._copies:
                module._parameters["weight"] = copy
            yield
        finally:
            for module, weight in own:
                module._parameters["weight"] = weight


def _is_cast_by_autocast(module: nn.Module) -> bool:
    if type(module) is Linear:
        role, _ = module.__dict__["_declared"]["weight"]
        return role.kind != "router"
    return type(module) is LMHead
