"""The router of a mixture of experts: which experts a token uses, and what keeps their loads even."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fusedlm.nn.linear import Linear
from fusedlm.nn.module import Module, OpUse


class Routing(NamedTuple):
    """Of N tokens and E experts, k of them for each token; float32 or better.

    logits_NE: W x.
    scores_NE: sigmoid(logits), without the balance bias.
    indices_NK: (N, k) int64, the experts of each token, all different.
    weights_NK: (N, k), the factors of their outputs.
    """

    logits_NE: torch.Tensor
    scores_NE: torch.Tensor
    indices_NK: torch.Tensor
    weights_NK: torch.Tensor


def highest(values: torch.Tensor, k: int) -> torch.Tensor:
    """(..., k) int64: the indices of the k highest of the last dimension, all different while values are finite.

    torch.compile fuses the steps of a loop with what surrounds them, but launches a kernel for topk, which took 3% of a
    training step of fusion-1b.
    """
    if not torch.compiler.is_compiling():
        return values.topk(k, dim=-1).indices
    found, rest = [], values
    columns = torch.arange(values.shape[-1], device=values.device)
    for _ in range(k):
        found.append(rest.argmax(-1))
        rest = torch.where(columns == found[-1][..., None], -torch.inf, rest)
    return torch.stack(found, -1)


def is_highest(values: torch.Tensor, k: int) -> torch.Tensor:
    """(..., E) bool: whether a value is among the k highest of the last dimension."""
    indices = highest(values, k)
    if not torch.compiler.is_compiling():
        return torch.zeros_like(values, dtype=torch.bool).scatter(-1, indices, True)
    columns = torch.arange(values.shape[-1], device=values.device)
    return (columns == indices[..., None]).any(-2)


class Router(Module):
    """Group-limited top-k routing with a balance bias (DeepSeek-V3, arXiv 2412.19437, eq. 13 to 16).

    The bias is added to the scores for the selection alone: neither weights nor gradients see it. It is a buffer, which
    `balance` moves once per optimizer step.
    """

    def __init__(
        self,
        *,
        dim: int,
        n_experts: int,
        top_k: int,
        n_groups: int,
        n_limited_groups: int | None,
        scaling: float,
        bias_rate: float,
    ):
        super().__init__()
        self.n_experts, self.top_k, self.scaling, self.bias_rate = n_experts, top_k, scaling, bias_rate
        self.n_groups, self.n_limited_groups = n_groups, n_limited_groups or n_groups
        self.project = Linear(dim, n_experts, kind="router")
        self.add_buffer("bias", (n_experts,), 0.0)

    def forward(self, x_ND: torch.Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = self.project(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
            scores_NE = logits_NE.sigmoid()
            indices_NK = self.select(scores_NE.detach() + self.bias)
            chosen_NK = logits_NE.gather(-1, indices_NK)
            # The only weight would always be 1, and the router would not learn.
            weights_NK = normalised_scores(chosen_NK) if self.top_k > 1 else chosen_NK.sigmoid()
            return Routing(logits_NE, scores_NE, indices_NK, weights_NK * self.scaling)

    def select(self, biased_NE: torch.Tensor) -> torch.Tensor:
        """(N, k) int64: the experts with the highest biased scores in the best groups, which are those with the highest
        sums of their two best."""
        if self.n_limited_groups < self.n_groups:
            grouped_NGM = biased_NE.unflatten(-1, (self.n_groups, -1))
            best_NGM = is_highest(grouped_NGM, min(2, grouped_NGM.shape[-1]))
            value_NG = torch.where(best_NGM, grouped_NGM, 0.0).sum(-1)
            taken_NG = is_highest(value_NG, self.n_limited_groups)
            biased_NE = torch.where(taken_NG[..., None], grouped_NGM, -torch.inf).flatten(-2)
        return highest(biased_NE, self.top_k)

    @torch.no_grad()
    def balance(self, loads_E: torch.Tensor, taken: torch.Tensor) -> None:
        """Move the bias by the loads of an optimizer step: by bias_rate * sign(mean load - load), less the mean of that
        over the experts, so that biases do not drift together. Does not wait for the device.

        Args:
            loads_E: (E,) int64 tokens of each expert, of the full batch: all micro-batches and processes.
            taken: () bool, whether the step was taken; if not, the bias stays as it is.
        """
        # In integers: a load that is the mean has a sign of exactly 0.
        direction_E = (loads_E.sum() - self.n_experts * loads_E).sign().to(self.bias.dtype)
        self.bias += self.bias_rate * taken * (direction_E - direction_E.mean())

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse("float32_linear", "float32_linear", {})]

    def flops(self, n_tokens: int) -> int:
        return self.project.flops(n_tokens)


def normalised_scores(logits: torch.Tensor) -> torch.Tensor:
    """sigmoid(logits) over their sum, of the last dimension. As a softmax of logarithms: scores of very negative logits
    are 0, and the gradient of their quotient is not finite."""
    return F.logsigmoid(logits).softmax(-1)


def sequence_balance_loss(logits_BTE: torch.Tensor, top_k: int) -> torch.Tensor:
    """() sum over the experts of f P, mean over the sequences (arXiv 2412.19437, eq. 17 to 20); 1 where all is even.

    f is the fraction of a sequence's tokens that have the expert among the top_k of their scores, without bias and
    groups, times E / top_k; P the mean of its score as a fraction of all scores of the token. f has no gradient.
    """
    _, n_tokens, n_experts = logits_BTE.shape
    counts_BE = is_highest(logits_BTE.detach(), top_k).sum(1, dtype=logits_BTE.dtype)
    share_BE = normalised_scores(logits_BTE).mean(1)
    return (counts_BE * share_BE).sum(-1).mean() * (n_experts / (top_k * n_tokens))


def router_z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """() mean over the tokens of log(sum(exp(logits)))^2 (arXiv 2202.08906, eq. 5)."""
    return logits_NE.logsumexp(-1).square().mean()
