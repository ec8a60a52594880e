"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

import torch

from fusedlm.config.mixers import MLAConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.mixers.latent import LatentMixer, reach_of
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops
from fusedlm.ops.attention.op import cached_attention
from fusedlm.ops.common import Setting


class LatentAttention(LatentMixer):
    """Softmax attention over keys and values from the latent."""

    def __init__(self, config: MLAConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__(config, model, setting, layer, n_streams=1)
        self.attend = SoftmaxAttention(
            model.impl, setting, head_dim=self.head_dim + self.rope[0], value_dim=self.head_dim
        )

    @property
    def choices(self):
        return [*super().choices, *self.attend.choices]

    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor]:
        return (self.attend(queries[0], keys[0], v, context.scale_scores(self.scale, self.rope[0]), context),)

    def absorbed(self, queries, q_noise, memory, context: Context) -> tuple[torch.Tensor]:
        (q,), keys = queries, memory[:, :, None]
        scale = context.scale_scores(self.scale, self.rope[0])
        read = cached_attention(q, keys, keys[..., : self.rank], scale=scale, reach_BT=reach_of(q, context))
        return (self.raised(read),)

    def combined(self, x_BTD: torch.Tensor | None, heads_BTHE: torch.Tensor) -> torch.Tensor:
        return heads_BTHE

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form."""
        attend = attention_flops(n_tokens, None, self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        return self.projection_flops(n_tokens) + attend
