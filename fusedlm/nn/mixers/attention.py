"""Softmax attention with grouped queries, partial rotary embedding, query-key norm and sliding window."""

import torch

from fusedlm.nn.cache import TokenCache, WindowCache, cached_tokens, fuses_append
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear, fuses_norm
from fusedlm.nn.mixers.softmax import SoftmaxAttention, attention_flops, widened_scale
from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.norm import rms_norm
from fusedlm.nn.rope import apply_rope
from fusedlm.nn.value_embedding import ValueEmbedding
from fusedlm.nn.value_residual import ValueResidual
from fusedlm.ops import cached_attention, exclude_own_value, rmsnorm_rope, rope_append
from fusedlm.ops.common import runs_fused

Q_GAIN = 1.5  # initial learnt gain on normalised queries: unit vectors alone cannot give sharp attention


class Attention(Module):
    """Multi-head attention, its keys and values shared by groups of query heads.

    With output_gate the output of the heads is multiplied by sigmoid(W_g x), element by element, before the last
    projection (arXiv 2505.06708)."""

    branch_end = "out"

    def __init__(
        self,
        *,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        rope_base: float = 10_000.0,
        qk_norm: bool = True,
        qk_gain: str = "head",
        window: int | None = None,
        output_gate: bool = False,
        xsa: bool = False,
        value_residual: bool = False,
        value_embedding: int | None = None,
        norm_eps: float = 1e-6,
        layer: int = 0,
        value_sources: set | None = None,
    ):
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        self.head_dim = head_dim or dim // n_heads
        self.rope = (self.head_dim if rope_dim is None else rope_dim, rope_base)
        self.window, self.xsa = window, xsa
        self.qk_eps = norm_eps if qk_norm else None
        self.scale = self.head_dim**-0.5
        self.heads = [self.n_heads, self.n_kv_heads, self.n_kv_heads]  # of q, k and v
        widths = [heads * self.head_dim for heads in self.heads]
        splits = dict(zip("qkv", widths, strict=True))
        if output_gate:
            self.heads.append(self.n_heads)
            splits["gate"] = widths[0]
        self.output_gate = output_gate
        self.qkv = Linear(dim, sum(splits.values()), splits=splits)
        self.out = Linear(self.n_heads * self.head_dim, dim, zero=True)
        by_dim = qk_norm and qk_gain == "dim"
        if by_dim:
            self.add_parameter("q_gain", (self.head_dim,), Role("gain"), Constant(Q_GAIN))
            self.add_parameter("k_gain", (self.head_dim,), Role("gain"), Constant(1.0))
        elif qk_norm and qk_gain == "head":
            self.add_parameter("q_gain", (self.n_heads,), Role("per_head"), Constant(Q_GAIN))
        else:
            self.q_gain = None
        if not by_dim:
            self.k_gain = None
        self.value_embedding = None if value_embedding is None else ValueEmbedding(value_embedding, widths[2])
        self.value_residual = None
        if value_residual:
            self.value_residual = ValueResidual(
                "attention", widths[2], set() if value_sources is None else value_sources
            )
        self.attend = SoftmaxAttention(self.head_dim, self.head_dim, window)

    def widen_from(self, base: "Attention") -> None:
        self.scale = widened_scale(self.scale, base.scale)

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        return fuses_norm(self.qkv, x_BTD)

    def forward(self, x_BTD, context: Context, state: list | None = None) -> torch.Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q, k, v, *gate = qkv.split(self.heads, dim=2)
        if self.value_embedding is not None:
            v = self.value_embedding(v.flatten(-2), context).view_as(v)
        if self.value_residual is not None:
            v = self.value_residual(v.flatten(-2), context).view_as(v)
        own = v
        scale = context.scale_scores(self.scale, self.rope[0])
        # The kernels have one gain per head.
        appends = self.k_gain is None and fuses_append(context, self.backend("rope_append"), qkv)
        appends = appends and not state[0].spare
        if appends:
            q, k, v = self._appended(q, k, v, context, state)
        else:
            q, k = self._rotated(qkv, q, k, context)
        if state is not None and not appends:
            k, v = (cache.append(new, context) for cache, new in zip(state, (k, v), strict=True))
        if context.past == 0:
            y = self.attend(q, k, v, scale, context)
        else:
            starts_B, visible_before_BT = state[0].visible(context)
            y = cached_attention(
                q,
                k,
                v,
                scale=scale,
                visible_before_BT=visible_before_BT,
                starts_B=starts_B,
                backend=self.backend("cached_attention"),
            )
        if self.xsa:
            y = exclude_own_value(y, own, backend=self.backend("exclude_own_value"))
        if self.output_gate:
            y = y * gate[0].sigmoid()
        return self.out(y.flatten(-2))

    def _rotated(self, qkv, q, k, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with norm, gain and rotary embedding."""
        table, backend = context.rope[self.rope], self.backend("rmsnorm_rope")
        if self.k_gain is not None:
            q, k = rms_norm(q, self.qk_eps, self.q_gain), rms_norm(k, self.qk_eps, self.k_gain)
            return apply_rope(q, table), apply_rope(k, table)
        if not torch.is_grad_enabled() and runs_fused("rmsnorm_rope", backend, qkv):
            qk = qkv[:, :, : self.n_heads + self.n_kv_heads]
            rotated = rmsnorm_rope(qk, *table, eps=self.qk_eps, gain_H=self.q_gain, backend=backend)
            return rotated.split(self.heads[:2], dim=2)
        if self.qk_eps is not None:
            q, k = rms_norm(q, self.qk_eps), rms_norm(k, self.qk_eps)
        if self.q_gain is not None:
            q = (q * self.q_gain[:, None]).to(qkv.dtype)
        return apply_rope(q, table), apply_rope(k, table)

    def _appended(self, q, k, v, context: Context, state: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, and all keys and values of a static state, in one kernel."""
        keys, values = (cache.rows for cache in state)
        q = rope_append(
            q,
            k,
            v.flatten(2),
            keys,
            values.flatten(2),
            context.starts_B,
            *context.rope[self.rope],
            eps=self.qk_eps,
            gain_H=self.q_gain,
            backend=self.backend("rope_append"),
        )
        return q, keys, values

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> list[TokenCache | WindowCache]:
        if self.window is not None:
            return [WindowCache(self.window), WindowCache(self.window)]
        return [TokenCache(max_tokens), TokenCache(max_tokens)]

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return cached_tokens(n_tokens, self.window) * 2 * self.n_kv_heads * self.head_dim * dtype.itemsize

    def flops(self, n_tokens: int) -> int:
        attend = attention_flops(n_tokens, self.window, self.n_heads, self.head_dim, self.head_dim)
        embedded = 0 if self.value_embedding is None else self.value_embedding.flops(n_tokens)
        return self.qkv.flops(n_tokens) + embedded + attend + self.out.flops(n_tokens)

    def saved_elements(self) -> float:
        """Queries and keys after norm and rotary embedding, and the output before a gate."""
        return (self.n_heads * (1 + self.output_gate) + self.n_kv_heads) * self.head_dim

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}

    def ops(self, device: torch.device) -> list[OpUse]:
        cached = OpUse("cached_attention", "cached_attention", self.attend.sizes)
        fused = ("rmsnorm_rope", "rope_append") if self.k_gain is None else ()
        rotary = [OpUse(name, name, {}) for name in fused]
        used = [*self.attend.ops(device), cached, self.qkv.norm_op(), *rotary]
        if self.xsa:
            used.append(OpUse("exclude_own_value", "exclude_own_value", {"head_dim": self.head_dim}))
        return used
