"""Final norm, projection to the vocabulary, and the loss on it."""

import torch
import torch.nn.functional as F

from fusedlm.config.model import ModelConfig
from fusedlm.nn.norm import RMSNorm
from fusedlm.ops.common import Setting
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
        self.choices = [SOFTCAP_CROSS_ENTROPY.choose(model.impl.softcap_cross_entropy, setting)]

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, vocab_size) float32 or better."""
        return softcap(F.linear(self.norm(hidden_BTD), self.weight), self.cap)[..., : self.vocab_size]

    def forward(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """(N,) nll in nats of each target; 0 where the target is -100."""
        return softcap_cross_entropy(
            F.linear(self.norm(hidden_ND), self.weight),
            targets_N,
            cap=self.cap,
            n_classes=self.vocab_size,
            implementation=self.choices[0].function,
        )

    def loss(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) nll in nats."""
        run = self if torch.is_grad_enabled() else self.forward  # compiled for training only, as the blocks are
        return run(hidden_BTD.flatten(0, 1), targets_BT.flatten()).view_as(targets_BT)

    def flops(self, n_tokens: int) -> int:
        return 2 * self.weight.numel() * n_tokens
