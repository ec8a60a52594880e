"""What mixers over a shared latent have in common: the projections, the state, absorbed decoding."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fusedlm.config.mixers import MLAConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.cache import TokenCache
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.norm import RMSNorm, project_normed
from fusedlm.nn.rope import apply_rope
from fusedlm.nn.value_residual import ValueResidual
from fusedlm.nn.xsa import exclude_own_value
from fusedlm.ops.common import Choice, Setting
from fusedlm.ops.rmsnorm_linear.op import RMSNORM_LINEAR


class LatentMixer(torch.nn.Module, ABC):
    """Keys and values come from one normalised latent of kv_rank numbers a token; position enters through rope_dim
    more, shared by all heads and stored rotated. The state is that latent and that key, whatever the number of heads.

    Whole sequences go through `expanded`, which makes keys and values of the latents. Later tokens go through
    `absorbed`, which attends to the latents themselves with the up-projections moved to query and output.
    """

    # Whether all behind attention is computed again in the backward pass rather than kept.
    computes_end_again = False
    # Whether `combined` reads x.
    ends_with_input = False

    def __init__(
        self,
        config: MLAConfig,
        model: ModelConfig,
        setting: Setting,
        layer: int,
        *,
        n_streams: int,
        noise_dim: int = 0,
    ):
        """n_streams: sets of queries and keys without position, side by side in each head. noise_dim: width of one more
        query and key, which no head has to itself."""
        super().__init__()
        self.n_heads = config.n_heads
        self.n_groups = config.n_kv_groups or config.n_heads
        self.head_dim = config.head_dim or model.dim // config.n_heads
        self.rank, self.q_rank, self.noise_dim = config.kv_rank, config.q_rank, noise_dim
        self.rope = (config.rope_dim, config.rope_base)
        self.scale = (self.head_dim + config.rope_dim) ** -0.5
        self.n_streams = n_streams
        self.xsa = config.xsa
        # Projections of one input are one matrix: narrow ones leave most of a GPU idle.
        self.down = Linear(model.dim, (config.q_rank or 0) + self.rank + config.rope_dim)
        self.q_norm = RMSNorm(config.q_rank, model.norm_eps) if config.q_rank is not None else None
        self.kv_norm = RMSNorm(self.rank, model.norm_eps)
        self.q_widths = [self.n_heads * (n_streams * self.head_dim + config.rope_dim), noise_dim]
        self.q_up = Linear(config.q_rank or model.dim, sum(self.q_widths))
        self.normed_q: Choice | None = None  # the other latent is kept normalised, and so is no part of an op like this
        if config.q_rank is not None:
            features = {"in_features": config.q_rank, "out_features": sum(self.q_widths)}
            self.normed_q = RMSNORM_LINEAR.choose(model.impl.rmsnorm_linear, setting, **features)
        self.kv_widths = [self.n_groups * n_streams * self.head_dim, self.n_groups * self.head_dim, noise_dim]
        self.kv_up = Linear(self.rank, sum(self.kv_widths))
        self.out = Linear(self.n_heads * self.head_dim, model.dim, zero=True)
        self.value_residual = None
        if config.value_residual:
            self.value_residual = ValueResidual(model, layer, self.rank, lambda c: c.kv_rank)

    @property
    def input_projection(self) -> Linear | None:
        """None where x is read by more than this one."""
        return None if self.q_rank is None or self.ends_with_input else self.down

    def forward(self, x_BTD: torch.Tensor, context: Context, state: TokenCache | None = None) -> torch.Tensor:
        return self._mix(self.down(x_BTD), x_BTD, context, state)

    def mix(self, projected_BTE: torch.Tensor, context: Context, state: TokenCache | None = None) -> torch.Tensor:
        return self._mix(projected_BTE, None, context, state)

    def _mix(self, projected_BTE, x_BTD: torch.Tensor | None, context: Context, state) -> torch.Tensor:
        q_latent, latent, k_rope = projected_BTE.split([self.q_rank or 0, self.rank, self.rope[0]], dim=-1)
        q, q_noise = self._queries(x_BTD, q_latent).split(self.q_widths, dim=-1)
        q = q.unflatten(-1, (self.n_heads, -1))
        q, q_rope = q.split([self.n_streams * self.head_dim, self.rope[0]], dim=-1)
        latent = self.kv_norm(latent)
        if self.value_residual is not None:
            latent = self.value_residual(latent, context)
        table = context.rope[self.rope]
        q_rope, k_rope = apply_rope(q_rope, table), apply_rope(k_rope[:, :, None], table)
        memory = None if state is None else state.append(torch.cat([latent, k_rope[:, :, 0]], dim=-1))
        if context.n_past == 0:
            k, v, k_noise = self.kv_up(latent).split(self.kv_widths, dim=-1)
            v = v.unflatten(-1, (self.n_groups, self.head_dim))
            keys = self.keys(k, k_rope)
            streams = self.expanded(self.queries(q, q_rope), keys, v, latent, q_noise, k_noise, context)
        else:
            v = self.values(latent) if self.xsa else None
            streams = self.absorbed(self.absorbed_queries(q, q_rope), q_noise, memory, context)
        if self.computes_end_again and torch.is_grad_enabled():
            return checkpoint(self._end, x_BTD, v, *streams, use_reentrant=False)
        return self._end(x_BTD, v, *streams)

    def _queries(self, x_BTD: torch.Tensor | None, q_latent_BTR: torch.Tensor) -> torch.Tensor:
        if self.q_norm is None:
            return self.q_up(x_BTD)
        return project_normed(q_latent_BTR, self.q_norm, self.q_up, self.normed_q)

    def _end(self, x_BTD, v_BTGE, *streams) -> torch.Tensor:
        y = self.combined(x_BTD, *streams)
        if self.xsa:
            y = exclude_own_value(y, v_BTGE)
        return self.out(y.flatten(-2))

    @property
    def choices(self) -> list[Choice]:
        return [] if self.normed_q is None else [self.normed_q]

    @abstractmethod
    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor, ...]:
        """What attention gives over whole sequences, for `combined`; queries and keys of each stream
        (B, T, H or G, head_dim + rope_dim), v (B, T, G, head_dim), latent (B, T, rank), q_noise and k_noise
        (B, T, noise_dim)."""

    @abstractmethod
    def absorbed(self, queries, q_noise, memory, context: Context) -> tuple[torch.Tensor, ...]:
        """The same for tokens after those in memory (B, S, rank + rope_dim), which holds them too; queries of each
        stream (B, T, H, rank + rope_dim)."""

    @abstractmethod
    def combined(self, x_BTD: torch.Tensor | None, *streams: torch.Tensor) -> torch.Tensor:
        """(B, T, H, head_dim) of what attention gave, and of x where `ends_with_input`."""

    def up_weights(self) -> list[torch.Tensor]:
        """The rows of kv_up that make keys, values and the noise key of a latent."""
        return self.kv_up.weight.split(self.kv_widths)

    def values(self, latent_BTR: torch.Tensor) -> torch.Tensor:
        """(B, T, G, head_dim)."""
        return F.linear(latent_BTR, self.up_weights()[1]).unflatten(-1, (self.n_groups, self.head_dim))

    def keys(self, k: torch.Tensor, k_rope_BT1R: torch.Tensor) -> list[torch.Tensor]:
        """For each stream (B, T, G, head_dim + rope_dim)."""
        streams = k.unflatten(-1, (self.n_groups, self.n_streams, self.head_dim)).unbind(3)
        k_rope = k_rope_BT1R.expand(-1, -1, self.n_groups, -1)
        return [torch.cat([k, k_rope], dim=-1) for k in streams]

    def queries(self, q_content: torch.Tensor, q_rope: torch.Tensor) -> list[torch.Tensor]:
        """For each stream (B, T, H, head_dim + rope_dim)."""
        return [torch.cat([q, q_rope], dim=-1) for q in q_content.split(self.head_dim, dim=-1)]

    def absorbed_queries(self, q_content: torch.Tensor, q_rope: torch.Tensor) -> list[torch.Tensor]:
        """The same against the memory: (B, T, H, rank + rope_dim)."""
        k_up = self.up_weights()[0].unflatten(0, (self.n_groups, self.n_streams, self.head_dim))
        in_groups = q_content.unflatten(2, (self.n_groups, -1)).unflatten(-1, (self.n_streams, self.head_dim))
        latent = torch.einsum("btgisd,gsdr->sbtgir", in_groups, k_up).flatten(3, 4)
        return [torch.cat([q, q_rope], dim=-1) for q in latent.unbind(0)]

    def raised(self, read_BTHR: torch.Tensor) -> torch.Tensor:
        """What each head read of the latents (B, T, H, rank), as values (B, T, H, head_dim)."""
        v_up = self.up_weights()[1].unflatten(0, (self.n_groups, self.head_dim))
        in_groups = read_BTHR.unflatten(2, (self.n_groups, -1))
        return torch.einsum("btgir,gdr->btgid", in_groups, v_up).flatten(2, 3)

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> TokenCache:
        return TokenCache(max_tokens)

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return n_tokens * (self.rank + self.rope[0]) * dtype.itemsize

    def projection_flops(self, n_tokens: int) -> int:
        return sum(linear.flops(n_tokens) for linear in (self.down, self.q_up, self.kv_up, self.out))

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}


def reach_of(q_BTHD: torch.Tensor, context: Context) -> torch.Tensor | None:
    """How far back each query sees; None for a single token outside packed documents, which sees all."""
    return None if q_BTHD.shape[1] == 1 and not context.packed else context.positions_BT
