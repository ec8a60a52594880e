"""Final norm, projection to the vocabulary, and the loss on it."""

import torch
import torch.nn.functional as F

from fusedlm.nn.ids import check_ids
from fusedlm.nn.linear import product_dtype
from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.pending import fuses_token
from fusedlm.ops import linear_softcap_cross_entropy
from fusedlm.ops.common import runs_fused
from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX, SigmoidCap, softcap

_OP = "linear_softcap_cross_entropy"
_LOGITS = 2**25  # most logits at a time without gradients: 128 MiB in float32


class LMHead(Module):
    """The embedding's weight when tied, else one of its own that starts at zero."""

    def __init__(
        self,
        *,
        dim: int,
        n_rows: int,
        vocab_size: int,
        cap: float | SigmoidCap | None,
        norm_eps: float,
        tied: torch.nn.Module | None,
    ):
        """
        Args:
            n_rows: rows of the weight; those from vocab_size on are padding and never predicted.
            cap: of the logits; None: none.
            tied: the embedding whose weight this shares; None: it has its own.
        """
        super().__init__()
        self.vocab_size, self.cap = vocab_size, cap
        self.norm = RMSNorm(dim, norm_eps)
        if tied is None:
            role = Role("head", fan_in=dim, fan_out=n_rows)
            self.add_parameter("weight", (n_rows, dim), role, Constant(0.0))
        else:
            self.weight = tied.weight

    def widen_from(self, base: "LMHead") -> None:
        """Logits are sums over the width: they are divided by its growth, as a factor of the last norm."""
        self.norm.scale = len(base.norm.weight) / len(self.norm.weight)

    def forward(
        self,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits, or the loss on targets.

        Args:
            hidden_ND: (N, dim), or for logits (..., dim).
            targets_N: (N,) int64, -100 where there is none.
            token_weight: () factor on every token's loss in the sum; None: 1.

        Returns:
            Without targets (..., vocab_size) float32 or better. With them the weighted sum (), and (N,) nll in nats, 0
            where the target is -100, without a gradient. A fused backend never holds all logits.

        Raises:
            ValueError: on the CPU, a target is neither in [0, vocab_size) nor -100.
        """
        if targets_N is None:
            return softcap(self._project(hidden_ND), self.cap)[..., : self.vocab_size]
        x = self.norm(hidden_ND)
        check_ids("targets", targets_N, self.vocab_size, ignored=IGNORE_INDEX)
        x = x.to(product_dtype(x))
        if torch.is_grad_enabled() or runs_fused(_OP, self.backend(_OP), x):  # a fused one never holds all logits
            return self._loss(x, targets_N, token_weight)
        size = max(1, _LOGITS // self.weight.shape[0])
        sums, nll = zip(
            *(self._loss(*part, token_weight) for part in zip(x.split(size), targets_N.split(size), strict=True)),
            strict=True,
        )
        return torch.stack(sums).sum(), torch.cat(nll)

    def _project(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        if fuses_token(hidden_ND, self.backend("token_linear"), product_dtype(hidden_ND)):
            pending = self.norm(hidden_ND, pending=True)
            return pending.project_token(self.weight, product_dtype(hidden_ND), self.backend("token_linear"))
        return F.linear(self.norm(hidden_ND), self.weight)

    def _loss(self, x_ND, targets_N, token_weight) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_softcap_cross_entropy(
            x_ND,
            self.weight,
            targets_N,
            token_weight,
            cap=self.cap,
            n_classes=self.vocab_size,
            backend=self.backend(_OP),
        )

    def flops(self, n_tokens: int) -> int:
        return 2 * self.weight.numel() * n_tokens

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse(_OP, _OP, {}), OpUse("token_linear", "token_linear", {})]
