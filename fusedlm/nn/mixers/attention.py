"""Softmax attention with grouped queries, partial rotary embedding, query-key norm and sliding window."""

import torch

from fusedlm.config.mixers import AttentionConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.cache import TokenCache, cached_tokens
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops
from fusedlm.nn.norm import rms_norm
from fusedlm.nn.rope import apply_rope
from fusedlm.nn.value_residual import ValueResidual
from fusedlm.nn.xsa import exclude_own_value
from fusedlm.ops.attention.op import cached_attention
from fusedlm.ops.attention.reference import reach
from fusedlm.ops.common import Setting

Q_GAIN = 1.5  # start of the learnt gain on normalised queries: unit vectors alone cannot make sharp attention


class Attention(torch.nn.Module):
    def __init__(self, config: AttentionConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or model.dim // config.n_heads
        self.rope = (self.head_dim if config.rope_dim is None else config.rope_dim, config.rope_base)
        self.window = config.window
        self.eps = model.norm_eps
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(model.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim)
        self.out = Linear(self.n_heads * self.head_dim, model.dim, zero=True)
        self.q_gain = torch.nn.Parameter(torch.full((self.n_heads,), Q_GAIN)) if config.qk_norm else None
        self.xsa = config.xsa
        self.value_residual = None
        if config.value_residual:
            width = self.n_kv_heads * self.head_dim
            self.value_residual = ValueResidual(
                model, layer, width, lambda c: (c.n_kv_heads or c.n_heads) * (c.head_dim or model.dim // c.n_heads)
            )
        self.attend = SoftmaxAttention(
            model.impl, setting, head_dim=self.head_dim, value_dim=self.head_dim, window=self.window
        )

    @property
    def choices(self):
        return self.attend.choices

    @property
    def input_projection(self) -> Linear:
        return self.qkv

    def forward(self, x_BTD: torch.Tensor, context: Context, state: list[TokenCache] | None = None) -> torch.Tensor:
        return self.mix(self.qkv(x_BTD), context, state)

    def mix(self, qkv_BTE: torch.Tensor, context: Context, state: list[TokenCache] | None = None) -> torch.Tensor:
        qkv = qkv_BTE.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.q_gain is not None:
            q = (rms_norm(q, self.eps) * self.q_gain[:, None]).to(qkv.dtype)
            k = rms_norm(k, self.eps)
        q, k = (apply_rope(x, context.rope[self.rope]) for x in (q, k))
        if self.value_residual is not None:
            v = self.value_residual(v.flatten(-2), context).view_as(v)
        own = v
        scale = context.scale_scores(self.scale, self.rope[0])
        if state is not None:
            k, v = (cache.append(new) for cache, new in zip(state, (k, v), strict=True))
        if context.n_past == 0:
            y = self.attend(q, k, v, scale, context)
        else:
            alone = q.shape[1] == 1 and not context.packed  # then it sees all that the cache holds
            reach_BT = None if alone else reach(context.positions_BT, self.window)
            y = cached_attention(q, k, v, scale=scale, reach_BT=reach_BT)
        if self.xsa:
            y = exclude_own_value(y, own)
        return self.out(y.flatten(-2))

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> list[TokenCache]:
        return [TokenCache(max_tokens, self.window), TokenCache(max_tokens, self.window)]

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return cached_tokens(n_tokens, self.window) * 2 * self.n_kv_heads * self.head_dim * dtype.itemsize

    def flops(self, n_tokens: int) -> int:
        attend = attention_flops(n_tokens, self.window, self.n_heads, self.head_dim, self.head_dim)
        return self.qkv.flops(n_tokens) + attend + self.out.flops(n_tokens)

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}
