"""Final norm, projection to the vocabulary, and the loss on it."""

import torch
import torch.nn.functional as F

from fusedlm.config.model import ModelConfig
from fusedlm.nn.linear import product_dtype
from fusedlm.nn.norm import RMSNorm
from fusedlm.ops.common import Setting
from fusedlm.ops.linear_softcap_cross_entropy.op import LINEAR_SOFTCAP_CROSS_ENTROPY, linear_softcap_cross_entropy
from fusedlm.ops.softcap_cross_entropy.op import SOFTCAP_CROSS_ENTROPY, softcap, softcap_cross_entropy


class LMHead(torch.nn.Module):
    """The embedding's weight when tied, else one of its own that starts at zero."""

    def __init__(self, model: ModelConfig, embedding: torch.nn.Embedding, vocab_size: int, setting: Setting):
        super().__init__()
        self.vocab_size = vocab_size
        self.cap = model.logit_softcap
        if model.tie_embeddings:
            self.weight = embedding.weight
        else:
            self.weight = torch.nn.Parameter(torch.zeros_like(embedding.weight))
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.linear_loss = LINEAR_SOFTCAP_CROSS_ENTROPY.choose(model.impl.linear_softcap_cross_entropy, setting)
        self.loss_of_logits = SOFTCAP_CROSS_ENTROPY.choose(model.impl.softcap_cross_entropy, setting)
        self.choices = [self.linear_loss, self.loss_of_logits]

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, vocab_size) float32 or better."""
        return softcap(F.linear(self.norm(hidden_BTD), self.weight), self.cap)[..., : self.vocab_size]

    def forward(
        self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, token_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N,) nll in nats of each target, 0 where the target is -100; with a weight () the sum of all times it, whose
        gradient may be made without holding all logits."""
        x = self.norm(hidden_ND)
        if token_weight is not None and self.linear_loss.name != "reference":
            return linear_softcap_cross_entropy(
                x.to(product_dtype(x)),
                self.weight,
                targets_N,
                token_weight.float(),
                cap=self.cap,
                n_classes=self.vocab_size,
                implementation=self.linear_loss.function,
            )[0]
        nll = softcap_cross_entropy(
            F.linear(x, self.weight),
            targets_N,
            cap=self.cap,
            n_classes=self.vocab_size,
            implementation=self.loss_of_logits.function,
        )
        return nll if token_weight is None else nll.sum() * token_weight.to(nll.dtype)

    def loss(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) nll in nats."""
        return self._run(hidden_BTD.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)

    def weighted_loss(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """() sum of all nll times weight ()."""
        return self._run(hidden_BTD.flatten(0, 1), targets_BT.flatten(), weight)

    def _run(self, *arguments: torch.Tensor) -> torch.Tensor:
        run = self if torch.is_grad_enabled() else self.forward  # compiled for training only, as the blocks are
        return run(*arguments)

    def flops(self, n_tokens: int) -> int:
        return 2 * self.weight.numel() * n_tokens
