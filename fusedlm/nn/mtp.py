"""Multi-token prediction: a module that looks one token further (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

import torch
import torch.nn.functional as F

from fusedlm.nn.block import Block
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import Module, OpUse
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.report import Report


class PredictionModule(Module):
    """Module k of multi-token prediction: h_k = block(W [norm(h_{k-1}); norm(e)]), e the embedding of the token k
    places later. From h_k the head of the model predicts the token after that one.

    In training it reports the metric `mtp`, (2,) float64: the sum of its nll in nats, and its valid targets.
    """

    metric = "mtp"

    def __init__(self, *, dim: int, norm_eps: float, **block):
        """block: the other arguments of `Block`."""
        super().__init__()
        self.hidden_norm = RMSNorm(dim, norm_eps)
        self.token_norm = RMSNorm(dim, norm_eps)
        self.project = Linear(2 * dim, dim)
        self.block = Block(dim=dim, norm_eps=norm_eps, **block)

    def forward(
        self, hidden_BTD: torch.Tensor, embedded_BTD: torch.Tensor, context: Context, state=None
    ) -> tuple[torch.Tensor, Report]:
        """hidden_BTD: h_{k-1} of each position, h_0 the output of the last block. embedded_BTD: the embedding of the
        token k places after each. Returns h_k (B, T, dim), and the report of the block."""
        joined = torch.cat([self.hidden_norm(hidden_BTD), self.token_norm(embedded_BTD)], dim=-1)
        return self.block(self.project(joined), context, state)

    @staticmethod
    def summarise(modules: list["PredictionModule"], sums: list[list[float]]) -> dict[str, list[float | None]]:
        """Figures of the metric `mtp`, summed over forward passes: `mtp_loss`, nats per valid target of each module;
        None where there was no target."""
        return {"mtp_loss": [nll / n if n else None for nll, n in sums]}

    def flops(self, n_tokens: int) -> int:
        return self.project.flops(n_tokens) + self.block.flops(n_tokens)

    def ops(self, device: torch.device) -> list[OpUse]:
        return self.block.ops(device)


def later(x_BT: torch.Tensor, n: int, fill: float = 0) -> torch.Tensor:
    """(B, T, ...) with x[:, t + n] at place t, and `fill` at the last n places, or at all T if they are fewer."""
    n = min(n, x_BT.shape[1])
    return F.pad(x_BT[:, n:], (0, 0) * (x_BT.dim() - 2) + (0, n), value=fill)


def later_targets(targets_BT: torch.Tensor, context: Context, n: int) -> torch.Tensor:
    """(B, T) int64, the targets n places later: -100 where they are after the end of the row, or where a document
    begins on the way there, since the prediction would need the tokens of both."""
    moved_BT = later(targets_BT, n, -100)
    if not context.packed:
        return moved_BT
    positions_BT = context.positions_BT
    same_BT = later(positions_BT, n, -1) == positions_BT + n
    return torch.where(same_BT, moved_BT, -100)
