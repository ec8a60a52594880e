"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

import torch

from fusedlm.config.mixers import MLAConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.cache import TokenCache
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.rope import apply_rope
from fusedlm.ops.attention.op import cached_attention
from fusedlm.ops.common import Setting


class LatentAttention(torch.nn.Module):
    """Keys and values come from one normalised latent of kv_rank numbers a token; position enters through rope_dim
    more, shared by all heads and stored rotated. The state is that latent and that key, whatever the number of heads.

    Whole sequences expand keys and values. Later tokens absorb the up-projections into query and output and attend to
    the latents themselves, which is the same function.
    """

    def __init__(self, config: MLAConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.n_groups = config.n_kv_groups or config.n_heads
        self.head_dim = config.head_dim or model.dim // config.n_heads
        self.rank = config.kv_rank
        self.rope = (config.rope_dim, config.rope_base)
        self.scale = (self.head_dim + config.rope_dim) ** -0.5
        query_in = config.q_rank or model.dim
        self.q_down = None
        if config.q_rank is not None:
            self.q_down = torch.nn.Sequential(Linear(model.dim, config.q_rank), RMSNorm(config.q_rank, model.norm_eps))
        self.q_up = Linear(query_in, self.n_heads * (self.head_dim + config.rope_dim))
        self.kv_down = Linear(model.dim, self.rank + config.rope_dim)
        self.kv_norm = RMSNorm(self.rank, model.norm_eps)
        self.k_up = Linear(self.rank, self.n_groups * self.head_dim)
        self.v_up = Linear(self.rank, self.n_groups * self.head_dim)
        self.out = Linear(self.n_heads * self.head_dim, model.dim, zero=True)
        self.attend = SoftmaxAttention(
            model.impl, setting, head_dim=self.head_dim + config.rope_dim, value_dim=self.head_dim
        )

    @property
    def choices(self):
        return self.attend.choices

    def forward(self, x_BTD: torch.Tensor, context: Context, state: TokenCache | None = None) -> torch.Tensor:
        q_in = x_BTD if self.q_down is None else self.q_down(x_BTD)
        q = self.q_up(q_in).unflatten(-1, (self.n_heads, -1))
        q_content, q_rope = q.split([self.head_dim, self.rope[0]], dim=-1)
        latent, k_rope = self.kv_down(x_BTD).split([self.rank, self.rope[0]], dim=-1)
        latent = self.kv_norm(latent)
        table = context.rope[self.rope]
        q_rope, k_rope = apply_rope(q_rope, table), apply_rope(k_rope[:, :, None], table)
        memory = None if state is None else state.append(torch.cat([latent, k_rope[:, :, 0]], dim=-1))
        if context.n_past == 0:
            y = self._expanded(q_content, q_rope, latent, k_rope, context)
        else:
            y = self._absorbed(q_content, q_rope, memory, context)
        return self.out(y.flatten(-2))

    def _expanded(self, q_content, q_rope, latent, k_rope, context: Context) -> torch.Tensor:
        k, v = (up(latent).unflatten(-1, (self.n_groups, self.head_dim)) for up in (self.k_up, self.v_up))
        k = torch.cat([k, k_rope.expand(-1, -1, self.n_groups, -1)], dim=-1)
        return self.attend(torch.cat([q_content, q_rope], dim=-1), k, v, self.scale, context)

    def _absorbed(self, q_content, q_rope, memory, context: Context) -> torch.Tensor:
        k_up, v_up = (up.weight.unflatten(0, (self.n_groups, self.head_dim)) for up in (self.k_up, self.v_up))
        in_groups = q_content.unflatten(2, (self.n_groups, -1))
        q_latent = torch.einsum("btgid,gdr->btgir", in_groups, k_up).flatten(2, 3)
        q = torch.cat([q_latent, q_rope], dim=-1)
        reach_BT = None if q.shape[1] == 1 and not context.packed else context.positions_BT
        keys = memory[:, :, None]
        read = cached_attention(q, keys, keys[..., : self.rank], scale=self.scale, reach_BT=reach_BT)
        in_groups = read.unflatten(2, (self.n_groups, -1))
        return torch.einsum("btgir,gdr->btgid", in_groups, v_up).flatten(2, 3)

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> TokenCache:
        return TokenCache(max_tokens)

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return n_tokens * (self.rank + self.rope[0]) * dtype.itemsize

    def flops(self, n_tokens: int) -> int:
        """Of the expanded form."""
        linears = [self.q_up, self.kv_down, self.k_up, self.v_up, self.out]
        if self.q_down is not None:
            linears.append(self.q_down[0])
        attend = attention_flops(n_tokens, None, self.n_heads, self.head_dim + self.rope[0], self.head_dim)
        return sum(linear.flops(n_tokens) for linear in linears) + attend

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}
