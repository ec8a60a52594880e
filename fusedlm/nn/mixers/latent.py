"""The base of mixers over a shared latent: projections, state, absorbed decoding."""

from abc import ABC, abstractmethod

import torch
from torch.utils.checkpoint import checkpoint

from fusedlm.nn.cache import TokenCache, fuses_append
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear, fuses_norm
from fusedlm.nn.mixers.softmax import SoftmaxAttention, widened_scale
from fusedlm.nn.module import Module, OpUse
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.rope import RopeTable, apply_rope
from fusedlm.nn.value_residual import ValueResidual
from fusedlm.ops import exclude_own_value, latent_decode, rmsnorm_rope, rope_append
from fusedlm.ops.common import runs_fused


class LatentMixer(Module, ABC):
    """Keys and values come from one normalised latent of kv_rank elements per token. Position enters through a rotary
    key of rope_dim elements, shared by all heads and stored rotated. The state is latent and rotary key, whatever the
    number of heads.

    Full sequences go through `expanded`, which computes keys and values from the latents. Later tokens go through
    `absorbed`, which attends to the latents themselves, the up-projections moved to query and output.
    """

    branch_end = "out"
    # Whether everything after attention is recomputed in the backward pass instead of saved.
    recomputes_output = False
    # Whether `combined` reads x.
    combines_with_input = False

    def __init__(
        self,
        *,
        mixer: str,
        n_streams: int = 1,
        noise_dim: int = 0,
        dim: int,
        n_heads: int,
        kv_rank: int,
        head_dim: int | None = None,
        q_rank: int | None = None,
        rope_dim: int = 32,
        rope_base: float = 10_000.0,
        n_kv_groups: int | None = None,
        xsa: bool = False,
        value_residual: bool = False,
        norm_eps: float = 1e-6,
        layer: int = 0,
        value_sources: set | None = None,
    ):
        """
        Args:
            mixer: type of the mixer.
            n_streams: sets of queries and keys without position in each head.
            noise_dim: width of one more query and key, shared by all heads; 0: none.
            The others: as the mixers take them.
        """
        super().__init__()
        self.n_heads = n_heads
        self.n_groups = n_kv_groups or n_heads
        self.head_dim = head_dim or dim // n_heads
        self.rank, self.q_rank, self.noise_dim = kv_rank, q_rank, noise_dim
        self.rope = (rope_dim, rope_base)
        self.scale = (self.head_dim + rope_dim) ** -0.5
        self.eps = norm_eps
        self.n_streams = n_streams
        self.xsa = xsa
        # Packed: narrow projections leave most of a GPU idle.
        down = {"q": q_rank or 0, "kv": kv_rank, "k_rope": rope_dim}
        self.down_widths = list(down.values())
        self.down = Linear(dim, sum(self.down_widths), splits=down)
        self.q_norm = RMSNorm(q_rank, norm_eps) if q_rank is not None else None
        self.kv_norm = RMSNorm(kv_rank, norm_eps)
        q = {"q": n_heads * (n_streams * self.head_dim + rope_dim), "noise": noise_dim}
        self.q_widths = list(q.values())
        self.q_up = Linear(q_rank or dim, sum(self.q_widths), splits=q)
        kv = {
            "k": self.n_groups * n_streams * self.head_dim,
            "v": self.n_groups * self.head_dim,
            "noise": noise_dim,
        }
        self.kv_widths = list(kv.values())
        self.kv_up = Linear(kv_rank, sum(self.kv_widths), splits=kv)
        self.out = Linear(n_heads * self.head_dim, dim, zero=True)
        self.value_residual = None
        if value_residual:
            self.value_residual = ValueResidual(mixer, kv_rank, value_sources)
        self.attend = SoftmaxAttention(self.head_dim + rope_dim, self.head_dim)

    def widen_from(self, base: "LatentMixer") -> None:
        self.scale = widened_scale(self.scale, base.scale)

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        """Where only `down` reads x."""
        return self.q_norm is not None and not self.combines_with_input and fuses_norm(self.down, x_BTD)

    def forward(self, x_BTD, context: Context, state: TokenCache | None = None) -> torch.Tensor:
        q_latent, latent, k_rope = self.down(x_BTD).split(self.down_widths, dim=-1)
        q, q_noise = self._queries(x_BTD, q_latent).split(self.q_widths, dim=-1)
        q = q.unflatten(-1, (self.n_heads, -1))
        q, q_rope = q.split([self.n_streams * self.head_dim, self.rope[0]], dim=-1)
        table = context.rope[self.rope]
        if fuses_append(context, self.backend("rope_append"), q) and self.rope[0]:
            latent, q_rope = self._appended(latent, q_rope, k_rope, context, state)
            v = self.values(latent) if self.xsa else None
            return self._output(
                self.absorbed(x_BTD, self._absorbed_queries(q, q_rope), q_noise, state.rows, context), v
            )
        latent = self._normed(latent, context)
        q_rope, k_rope = self._rotated(q_rope, table), self._rotated(k_rope[:, :, None], table)
        memory = None if state is None else state.append(torch.cat([latent, k_rope[:, :, 0]], dim=-1), context)
        if context.past == 0:
            k, v, k_noise = self.kv_up(latent).split(self.kv_widths, dim=-1)
            v = v.unflatten(-1, (self.n_groups, self.head_dim))
            queries = [torch.cat([part, q_rope], dim=-1) for part in q.split(self.head_dim, dim=-1)]
            streams = self.expanded(queries, self._keys(k, k_rope), v, latent, q_noise, k_noise, context)
            if self.recomputes_output and torch.is_grad_enabled():
                return checkpoint(self._combined_output, x_BTD, v, *streams, use_reentrant=False)
            return self._combined_output(x_BTD, v, *streams)
        v = self.values(latent) if self.xsa else None
        return self._output(self.absorbed(x_BTD, self._absorbed_queries(q, q_rope), q_noise, memory, context), v)

    def _normed(self, latent_BTR: torch.Tensor, context: Context) -> torch.Tensor:
        latent = self.kv_norm(latent_BTR)
        return latent if self.value_residual is None else self.value_residual(latent, context)

    def _appended(self, latent, q_rope, k_rope, context: Context, state: TokenCache):
        """Latent and rotated queries of the tokens of a static state, latent and rotary key written into it, in one
        kernel; the latent is returned without its norm where nothing else reads it."""
        norm = {}
        if self.xsa or self.value_residual is not None:
            latent = self._normed(latent, context)
        else:
            pending = self.kv_norm(latent, pending=True)
            norm = {"v_gain_E": pending.gain, "v_eps": pending.eps}
        values, keys = state.rows.split([self.rank, self.rope[0]], dim=-1)
        q_rope = rope_append(
            q_rope,
            k_rope[:, :, None],
            latent,
            keys[:, :, None],
            values,
            context.starts_B,
            *context.rope[self.rope],
            **norm,
            backend=self.backend("rope_append"),
        )
        return latent, q_rope

    def _queries(self, x_BTD, q_latent_BTR: torch.Tensor) -> torch.Tensor:
        if self.q_norm is None:
            return self.q_up(x_BTD)
        return self.q_up(self.q_norm(q_latent_BTR, pending=fuses_norm(self.q_up, q_latent_BTR)))

    def _rotated(self, x_BTHR: torch.Tensor, table: RopeTable) -> torch.Tensor:
        backend = self.backend("rmsnorm_rope")
        if not torch.is_grad_enabled() and runs_fused("rmsnorm_rope", backend, x_BTHR) and x_BTHR.shape[3]:
            return rmsnorm_rope(x_BTHR, *table, backend=backend)
        return apply_rope(x_BTHR, table)

    def _combined_output(self, x_BTD, v_BTGE, *streams) -> torch.Tensor:
        return self._output(self.combined(x_BTD, *streams), v_BTGE)

    def _output(self, heads_BTHE, v_BTGE) -> torch.Tensor:
        if self.xsa:
            heads_BTHE = exclude_own_value(heads_BTHE, v_BTGE, backend=self.backend("exclude_own_value"))
        return self.out(heads_BTHE.flatten(-2))

    @abstractmethod
    def expanded(self, queries, keys, v, latent, q_noise, k_noise, context: Context) -> tuple[torch.Tensor, ...]:
        """The outputs of attention over full sequences, for `combined`; queries and keys of each stream
        (B, T, H or G, head_dim + rope_dim), v (B, T, G, head_dim), latent (B, T, rank), q_noise and k_noise
        (B, T, noise_dim)."""

    @abstractmethod
    def combined(self, x_BTD, *streams: torch.Tensor) -> torch.Tensor:
        """(B, T, H, head_dim) from the outputs of attention, and from x where `combines_with_input`."""

    @abstractmethod
    def absorbed(self, x_BTD, queries, q_noise, memory, context: Context) -> torch.Tensor:
        """(B, T, H, head_dim) for tokens after others; memory (B, S, rank + rope_dim) holds those and these, queries of
        each stream are (B, T, H, rank + rope_dim)."""

    def values(self, latent_BTR: torch.Tensor) -> torch.Tensor:
        """(B, T, G, head_dim)."""
        return self.kv_up(latent_BTR, part="v").unflatten(-1, (self.n_groups, self.head_dim))

    def _keys(self, k: torch.Tensor, k_rope_BT1R: torch.Tensor) -> list[torch.Tensor]:
        """For each stream (B, T, G, head_dim + rope_dim)."""
        streams = k.unflatten(-1, (self.n_groups, self.n_streams, self.head_dim)).unbind(3)
        k_rope = k_rope_BT1R.expand(-1, -1, self.n_groups, -1)
        return [torch.cat([k, k_rope], dim=-1) for k in streams]

    def _absorbed_queries(self, q_BTHE: torch.Tensor, q_rope_BTHR: torch.Tensor) -> list[torch.Tensor]:
        """For each stream (B, T, H, rank + rope_dim): queries against the memory."""
        in_groups = q_BTHE.unflatten(2, (self.n_groups, -1)).unflatten(-1, (self.n_streams, self.head_dim))
        in_groups = in_groups.transpose(3, 4).flatten(2, 3)  # (B, T, G * streams, heads of a group, head_dim)
        latent = self.kv_up(in_groups, part="k", groups=self.n_groups * self.n_streams, transposed=True)
        latent = latent.unflatten(2, (self.n_groups, self.n_streams)).transpose(3, 4).flatten(2, 3)
        return [torch.cat([q, q_rope_BTHR], dim=-1) for q in latent.unbind(3)]

    def attend_memory(self, queries: list, memory: torch.Tensor, context: Context, noise_weight=None) -> torch.Tensor:
        """What the queries (B, T, heads, rank + rope_dim) read of the latents, in one pass over the memory: (B, T,
        heads, rank). With a noise weight the queries after the first H are the noise of each head or of all, and the
        weighted noise is subtracted: (B, T, H, rank)."""
        queries = queries[0] if len(queries) == 1 else torch.cat(queries, dim=2)
        return latent_decode(
            queries.to(memory.dtype),
            memory,
            rank=self.rank,
            scale=context.scale_scores(self.scale, self.rope[0]),
            starts_B=context.starts_B,
            visible_before_BT=context.visible_before() if context.packed else None,
            n_signal=None if noise_weight is None else self.n_heads,
            noise_weight=noise_weight,
            backend=self.backend("latent_decode"),
        )

    def head_values(self, read_BTHR: torch.Tensor) -> torch.Tensor:
        """What each head read of the latents (B, T, H, rank), as values (B, T, H, head_dim)."""
        in_groups = read_BTHR.unflatten(2, (self.n_groups, -1))
        return self.kv_up(in_groups, part="v", groups=self.n_groups).flatten(2, 3)

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> TokenCache:
        return TokenCache(max_tokens)

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return n_tokens * (self.rank + self.rope[0]) * dtype.itemsize

    def projection_flops(self, n_tokens: int) -> int:
        return sum(linear.flops(n_tokens) for linear in (self.down, self.q_up, self.kv_up, self.out))

    def saved_elements(self) -> float:
        """Queries and keys as attention reads them."""
        return (self.n_heads + self.n_groups) * self.n_streams * (self.head_dim + self.rope[0])

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}

    def ops(self, device: torch.device) -> list[OpUse]:
        sizes = {"rank": self.rank, "rope_dim": self.rope[0]}
        used = [*self.attend.ops(device), OpUse("latent_decode", "latent_decode", sizes)]
        used += [OpUse(name, name, {}) for name in ("rmsnorm_rope", "rope_append")]
        if self.xsa:
            used.append(OpUse("exclude_own_value", "exclude_own_value", {"head_dim": self.head_dim}))
        if self.q_norm is not None:
            used.append(self.q_up.norm_op()._replace(name="q_rmsnorm_linear"))
            if not self.combines_with_input:
                used.append(self.down.norm_op())
        return used
