"""Final norm, projection to the vocabulary, and the loss on it."""

import torch
import torch.nn.functional as F

from fusedlm.nn.ids import check_ids
from fusedlm.nn.linear import product_dtype
from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.pending import fuses_token
from fusedlm.nn.soft_targets import PendingLogits, SoftTargets
from fusedlm.ops import linear_distillation, linear_softcap_cross_entropy
from fusedlm.ops.common import runs_fused
from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX, SigmoidCap, softcap

_OP, _SOFT_OP = "linear_softcap_cross_entropy", "linear_distillation"
_LOGITS = 2**25  # most logits at a time without gradients: 128 MiB in float32


class LMHead(Module):
    """The embedding's weight when tied, else one of its own that starts at zero.

    With soft targets the decoder reports the metric `distill`, (3,) float64: the sums of nll and of divergences in
    nats, and the valid targets.
    """

    metric = "distill"

    def __init__(
        self,
        *,
        dim: int,
        n_rows: int,
        vocab_size: int,
        cap: float | SigmoidCap | None,
        norm_eps: float,
        tied: torch.nn.Module | None,
        norm_gain: bool = True,
    ):
        """
        Args:
            n_rows: rows of the weight; those from vocab_size on are padding and never predicted.
            cap: of the logits; None: none.
            tied: the embedding whose weight this shares; None: it has its own.
            norm_gain: whether the norm has a gain.
        """
        super().__init__()
        self.vocab_size, self.cap = vocab_size, cap
        self.norm = RMSNorm(dim, norm_eps, has_gain=norm_gain)
        if tied is None:
            role = Role("head", fan_in=dim, fan_out=n_rows)
            self.add_parameter("weight", (n_rows, dim), role, Constant(0.0))
        else:
            self.weight = tied.weight

    def widen_from(self, base: "LMHead") -> None:
        """Logits are sums over the width: they are divided by its growth, as a factor of the last norm."""
        self.norm.scale = base.norm.dim / self.norm.dim

    def forward(
        self,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
        soft_targets: SoftTargets | None = None,
        *,
        pending: bool = False,
    ) -> torch.Tensor | PendingLogits | tuple[torch.Tensor, ...]:
        """Logits, or the loss on targets.

        Args:
            hidden_ND: (N, dim), or for logits (..., dim).
            targets_N: (N,) int64, -100 where there is none.
            token_weight: () factor on every token's loss in the sum; None: 1.
            soft_targets: those of the N tokens, with targets alone.
            pending: leave the projection to whoever needs the logits; without targets.

        Returns:
            Without targets (..., vocab_size) float32 or better. With them the weighted sum (), and (N,) nll in nats, 0
            where the target is -100, without a gradient. With soft targets also the weighted sum () and the divergences
            (N,) of `linear_distillation`. A fused backend never holds all logits.

        Raises:
            ValueError: on the CPU, a target is neither in [0, vocab_size) nor -100.
        """
        if pending:
            x = self.norm(hidden_ND).flatten(0, -2)
            return PendingLogits(x.to(product_dtype(x)), self.weight, self.cap, self.vocab_size)
        if targets_N is None:
            return softcap(self._project(hidden_ND), self.cap)[..., : self.vocab_size]
        x = self.norm(hidden_ND)
        check_ids("targets", targets_N, self.vocab_size, ignored=IGNORE_INDEX)
        x = x.to(product_dtype(x))
        if soft_targets is not None:
            losses = self._loss(x, targets_N, token_weight)
            return *losses, *self._soft_loss(x, targets_N, token_weight, soft_targets)
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

    def _soft_loss(self, x_ND, targets_N, token_weight, soft_targets: SoftTargets) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = soft_targets.logits
        return linear_distillation(
            x_ND,
            self.weight,
            targets_N,
            token_weight,
            teacher.x_ND,
            teacher.weight_VD,
            cap=self.cap,
            teacher_cap=teacher.cap,
            n_classes=self.vocab_size,
            temperature=soft_targets.temperature,
            backend=self.backend(_SOFT_OP),
        )

    @staticmethod
    def summarise(heads: list["LMHead"], sums: list[list[float]]) -> dict[str, float | None]:
        """Figures of the metric `distill`, summed over forward passes: `nll` and `distill_kl`, nats per valid target;
        None if there is none."""
        nll, divergence, count = sums[0]
        return {name: total / count if count else None for name, total in (("nll", nll), ("distill_kl", divergence))}

    def flops(self, n_tokens: int) -> int:
        return 2 * self.weight.numel() * n_tokens

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse(_OP, _OP, {}), OpUse("token_linear", "token_linear", {})]
