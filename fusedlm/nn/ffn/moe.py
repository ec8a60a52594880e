"""Mixture of experts: some for every token, and for each token a few of many."""

import math

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.ffn.relu2 import ReLU2
from fusedlm.nn.ffn.router import Router, Routing, router_z_loss, sequence_balance_loss
from fusedlm.nn.ffn.swiglu import SwiGLU
from fusedlm.nn.module import Module, OpUse
from fusedlm.nn.report import Loss, Report
from fusedlm.ops import count_tokens
from fusedlm.ops.common import OPS, Call


class MoE(Module):
    """shared(x) + the sum over the chosen experts of weight * expert(x) (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Without routed experts (n_experts=0) it is the dense feed-forward `shared` alone, of the width that a token used:
    (n_shared + top_k) * hidden.

    Reports the metric `moe`, (E,) int64: tokens of each expert, of the context's selection. While training also the
    losses `moe_sequence` and `moe_z`, where their weights are not 0. Nothing is counted in the layer itself: an
    optimizer step adds the metrics of its micro-batches and processes, and `end_step` moves the balance biases by them.
    """

    def __init__(
        self,
        *,
        dim: int,
        n_experts: int,
        top_k: int,
        hidden: int,
        n_shared: int = 1,
        activation: str = "swiglu",
        slope: float = 0.0,
        n_groups: int = 1,
        n_limited_groups: int | None = None,
        routed_scaling: float = 1.0,
        bias_rate: float = 1e-3,
        sequence_loss: float = 0.0,
        z_loss: float = 0.0,
    ):
        """The arguments are those of fusedlm.config.ffn.MoEConfig."""
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.sequence_loss, self.z_loss = sequence_loss, z_loss
        self.metric = "moe" if n_experts else None
        units = hidden * (n_shared if n_experts else n_shared + top_k)
        kind = {"slope": slope} if activation == "relu2" else {}
        dense = {"swiglu": SwiGLU, "relu2": ReLU2}[activation]
        self.shared = dense(dim=dim, hidden=units, **kind) if units else None
        self.router = self.experts = None
        if n_experts:
            self.router = Router(
                dim=dim,
                n_experts=n_experts,
                top_k=top_k,
                n_groups=n_groups,
                n_limited_groups=n_limited_groups,
                scaling=routed_scaling,
                bias_rate=bias_rate,
            )
            self.experts = Experts(dim=dim, hidden=hidden, n_experts=n_experts, activation=activation, slope=slope)

    def forward(
        self, x_BTD: torch.Tensor, context: Context | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, Report]:
        if self.router is None:
            return self.shared(x_BTD)
        x_ND = x_BTD.flatten(0, -2)
        routing = self.router(x_ND)
        y_BTD = self.experts(x_ND, routing.indices_NK, routing.weights_NK).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = self.shared(x_BTD) + y_BTD
        select = None if context is None else context.select
        indices_NK = routing.indices_NK if select is None else routing.indices_NK[select]
        loads_E = count_tokens(indices_NK, self.n_experts).long()
        return y_BTD, Report(self._losses(routing, x_BTD.shape), {"moe": loads_E})

    def _losses(self, routing: Routing, shape: torch.Size) -> dict[str, Loss]:
        losses = {}
        if self.training and self.sequence_loss:
            logits_BTE = routing.logits_NE.view(*shape[:-1], self.n_experts)
            loss = sequence_balance_loss(logits_BTE, self.top_k)
            losses["moe_sequence"] = Loss(self.sequence_loss * loss, "batch")
        if self.training and self.z_loss:
            # Sequences of a step have the same length: the mean over tokens is that over sequences.
            losses["moe_z"] = Loss(self.z_loss * router_z_loss(routing.logits_NE), "batch")
        return losses

    @staticmethod
    def end_step(layers: list["MoE"], sums: torch.Tensor, taken: torch.Tensor) -> None:
        """Move the balance biases once, after an optimizer step. Does not wait for the device.

        Args:
            sums: (layers, at least E) int64, the metric `moe` of the full step.
            taken: () bool, whether the step was taken.
        """
        for layer, loads in zip(layers, sums, strict=True):
            layer.router.balance(loads[: layer.n_experts], taken)

    @staticmethod
    def summarise(layers: list["MoE"], sums: list[list[int]]) -> dict[str, float | int | list[list[float]]]:
        """Figures of the metric `moe`, summed over forward passes, a row per layer.

        Returns:
            moe_entropy: entropy of the loads as a fraction of its maximum, mean over the layers; 1: all even.
            moe_max_load: highest load over the mean one, of the worst layer; 1: all even.
            moe_dead: experts without a token, of all layers.
            moe_layers: entropy, highest over mean load, and dead experts of each layer, first to last.
        """
        rows = [_balance(loads[: layer.n_experts]) for layer, loads in zip(layers, sums, strict=True)]
        entropies, highest, dead = zip(*rows, strict=True)
        return {
            "moe_entropy": sum(entropies) / len(rows),
            "moe_max_load": max(highest),
            "moe_dead": sum(dead),
            "moe_layers": [list(row) for row in rows],
        }

    def flops(self, n_tokens: int) -> int:
        """Of the experts that tokens use."""
        shared = 0 if self.shared is None else self.shared.flops(n_tokens)
        if self.router is None:
            return shared
        return shared + self.router.flops(n_tokens) + self.experts.flops(self.top_k * n_tokens)

    def active_parameters(self) -> int:
        """Parameters that a token uses."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if self.experts is None:
            return total
        return total - (self.n_experts - self.top_k) * self.experts.parameters_of_one()

    def saved_elements(self) -> int:
        """Elements per token that the experts save for backward."""
        return 0 if self.experts is None else self.top_k * self.experts.saved_elements()

    def waits_for_device(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Where the experts run one by one, for their numbers of tokens."""
        if self.experts is None or device.type == "cpu":
            return False
        call = Call(device, dtype, torch.are_deterministic_algorithms_enabled())
        return OPS[self.experts.op].select(self.backend(self.experts.op), call).backend == "reference"

    def ops(self, device: torch.device) -> list[OpUse]:
        parts = (self.router, self.experts, self.shared)
        return [use for part in parts if part is not None for use in part.ops(device)]


def _balance(loads: list[int]) -> tuple[float, float, int]:
    """Normalised entropy, highest over mean load, experts without a token; 0.0, 0.0 and all of them without tokens."""
    total = sum(loads)
    if not total:
        return 0.0, 0.0, len(loads)
    entropy = -sum(n / total * math.log(n / total) for n in loads if n)
    return (entropy / math.log(len(loads)) if len(loads) > 1 else 1.0), max(loads) * len(loads) / total, loads.count(0)
