"""Weights in the precision of the products that decoding computes with them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.linear import Linear
from fusedlm.nn.lm_head import LMHead


class CastWeights:
    """Copies of a model's matrices in the dtype of autocast, which would cast each of them again at every step.

    Results are those of autocast, bit for bit: only weights of linear layers, experts and the head are copied, and a
    tied embedding is looked up in its own precision, as are routers, gains, biases and convolutions.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """dtype: of autocast; float32: nothing is copied."""
        self._copies: list[tuple[nn.Module, str, nn.Parameter]] = []
        if dtype == torch.float32:
            return
        for module in model.modules():
            for name in _cast_by_autocast(module):
                weight = module._parameters[name]
                if weight.dtype == torch.float32:
                    copy = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    self._copies.append((module, name, copy))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The model has the copies in place of its own weights."""
        own = [(module, name, module._parameters[name]) for module, name, _ in self._copies]
        try:
            for module, name, copy in self._copies:
                module._parameters[name] = copy
            yield
        finally:
            for module, name, weight in own:
                module._parameters[name] = weight


def _cast_by_autocast(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that autocast would cast."""
    if type(module) is Linear:
        role, _ = module.__dict__["_declared"]["weight"]
        return () if role.kind == "router" else ("weight",)
    if type(module) is Experts:
        return ("up", "down")
    return ("weight",) if type(module) is LMHead else ()
