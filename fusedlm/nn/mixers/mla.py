"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.mixers.latent import LatentMixer
from fusedlm.nn.mixers.softmax import attention_flops


class LatentAttention(LatentMixer):
    """Softmax attention over keys and values from the latent."""

    def __init__(self, **latent):
        """Takes the arguments of `LatentMixer`."""
        super().__init__(mixer="mla", **latent)

    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor]:
        return (self.attend(queries[0], keys[0], v, context.scale_scores(self.scale, self.rope[0]), context),)

    def combined(self, x_BTD, heads_BTHE: torch.Tensor) -> torch.Tensor:
        return heads_BTHE

    def absorbed(self, x_BTD, queries, q_noise, memory, context: Context) -> torch.Tensor:
        return self.head_values(self.attend_memory(queries, memory, context))

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form."""
        attend = attention_flops(n_tokens, None, self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        return self.projection_flops(n_tokens) + attend
