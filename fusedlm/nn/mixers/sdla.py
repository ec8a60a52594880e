"""Selective differential linear attention: linear time, and a state that does not grow."""

import math

import torch
import torch.nn.functional as F

from fusedlm.config.mixers import SDLAConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.norm import RMSNorm, rms_norm
from fusedlm.nn.recurrent_state import RecurrentState
from fusedlm.nn.rope import apply_rope
from fusedlm.ops.common import Setting
from fusedlm.ops.decayed_linear_attention.op import DECAYED_LINEAR_ATTENTION, chunked_flops, decayed_linear_attention
from fusedlm.ops.gated_scan.op import GATED_SCAN, gated_scan

DECAY_ROOT = 16  # the decay is the root of a sigmoid: sigmoids near 1/2 remember for tens of tokens
HALF_LIVES = 16.0, 1024.0  # tokens, of the first and the last head at the start


class SelectiveDifferentialLinearAttention(torch.nn.Module):
    """Two streams of linear attention, the second of which is subtracted from the first.

    Queries, keys and values come from one normalised latent c of `rank` numbers a token. Each stream's query and key
    have rope_dim rotary dimensions besides; the rotary key comes from x and is shared by the heads, as in `mla`. With
    K = head_dim + rope_dim and u = K^(-1/4) q or K^(-1/4) k, the feature map is phi(u) = 1 + u + u^2 / 2 >= 1/2
    elementwise, and per head and stream i

        S_t = a_t S_{t-1} + phi(k_t) v_t^T,  z_t = a_t z_{t-1} + phi(k_t),  o_i = S_t^T phi(q_t) / (z_t . phi(q_t)),

    with one decay for both streams, a_t = sigmoid(W_a x_t + b)^(1/16). The head's output is
    o = norm(o_1 - lambda_head lambda_layer o_2) (1 - lambda_init). With YaRN its gain on scores, half of it on either
    side, goes to the rotary dimensions.

    The working memory is as wide as one head: h_t = (1 - g_t) h_{t-1} + g_t tanh(W_h o_t) with g_t = sigmoid(W_g o_t);
    y = W_o (gamma o + (1 - gamma) W_m h) with gamma = sigmoid(W_gamma [x, h]).
    """

    def __init__(self, config: SDLAConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.head_dim = config.head_dim or model.dim // config.n_heads
        self.rope = (config.rope_dim, config.rope_base)
        self.key_dim = self.head_dim + config.rope_dim
        self.chunk_size = config.chunk_size
        self.eps = model.norm_eps
        rank, heads = config.rank or max(1, model.dim // 4), self.n_heads * self.head_dim
        self.memory_dim = self.head_dim if config.memory else 0
        self.down_widths = [rank, 2 * config.rope_dim, self.n_heads, heads if config.memory else 0]
        self.down = Linear(model.dim, sum(self.down_widths))  # c, rotary keys, decays, and gamma's part from x
        self.c_norm = RMSNorm(rank, model.norm_eps)
        self.qk_widths = [2 * self.n_heads * self.key_dim, 2 * self.n_heads * self.head_dim]
        self.qk_up = Linear(rank, sum(self.qk_widths))
        self.v_up = Linear(rank, heads)
        self.decay_bias = torch.nn.Parameter(_decay_bias(self.n_heads))
        start = initial_lambda(config.lambda_init, layer)
        self.lambda_head = torch.nn.Parameter(torch.full((self.n_heads,), start))
        self.lambda_layer = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("kept", torch.tensor(1 - start), persistent=False)
        self.head_norm = torch.nn.Parameter(torch.ones(self.head_dim))
        self.write = Linear(heads, 2 * self.memory_dim) if config.memory else None  # tanh's and g's argument
        self.read = Linear(self.memory_dim, 2 * heads) if config.memory else None  # the gist, and gamma's part from h
        self.out = Linear(heads, model.dim, zero=True)
        self.attend = DECAYED_LINEAR_ATTENTION.choose(model.impl.decayed_linear_attention, setting)
        self.scan = GATED_SCAN.choose(model.impl.gated_scan, setting) if config.memory else None

    @property
    def choices(self):
        return [choice for choice in (self.attend, self.scan) if choice is not None]

    @property
    def input_projection(self) -> Linear:
        return self.down

    def forward(self, x_BTD: torch.Tensor, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        return self.mix(self.down(x_BTD), context, state)

    def mix(self, projected_BTE: torch.Tensor, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        latent, k_rope, decay, gamma_x = projected_BTE.split(self.down_widths, dim=-1)
        latent = self.c_norm(latent)
        q, k = self._features(latent, k_rope, context)
        o = self._differ(q, k, self.v_up(latent), decay, context, state).to(projected_BTE.dtype)
        return self.out(o if self.read is None else self._with_gist(o, gamma_x, context, state))

    def _features(self, latent, k_rope, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """phi of queries and keys, (B, T, 2 H, K) float32, stream by stream; rotary dimensions first."""
        wide = torch.promote_types(latent.dtype, torch.float32)
        scale = self.key_dim**-0.25
        rope_scale = math.sqrt(context.scale_scores(1.0, self.rope[0]))
        table = context.rope[self.rope]
        q, k = self.qk_up(latent * scale).split(self.qk_widths, dim=-1)
        q = apply_rope(q.to(wide).unflatten(-1, (2 * self.n_heads, -1)), _scaled(table, rope_scale))
        k_rope = k_rope.to(wide).unflatten(-1, (2, -1)) * scale
        k_rope = apply_rope(k_rope, _scaled(table, rope_scale)).repeat_interleave(self.n_heads, dim=2)
        k = torch.cat([k_rope, k.to(wide).unflatten(-1, (2 * self.n_heads, -1))], dim=-1)
        return _phi(q), _phi(k)

    def _differ(self, q, k, v, decay, context: Context, state: RecurrentState | None) -> torch.Tensor:
        """Normalised outputs of all heads, (B, T, H V) float32."""
        log_decay = F.logsigmoid(decay.to(q.dtype) + self.decay_bias) / DECAY_ROOT
        v = F.pad(v.to(q.dtype).unflatten(-1, (self.n_heads, -1)), (0, 1), value=1.0)  # sums of ones are z
        out, sums = decayed_linear_attention(
            q,
            k,
            v.repeat(1, 1, 2, 1),
            log_decay.repeat(1, 1, 2),
            state_BHKV=None if state is None else state.memory,
            reset_BT=context.reset_BT,
            chunk_size=self.chunk_size,
            implementation=self.attend.function,
        )
        if state is not None:
            state.memory = sums
        weighted, z = out.split([self.head_dim, 1], dim=-1)
        signal, noise = (weighted / z).chunk(2, dim=2)
        o = signal - (self.lambda_head * self.lambda_layer)[:, None] * noise
        return rms_norm(o, self.eps, self.head_norm * self.kept).flatten(-2)

    def _with_gist(self, o, gamma_x, context: Context, state: RecurrentState | None) -> torch.Tensor:
        new, gate = self.write(o).chunk(2, dim=-1)
        gate = gate.sigmoid()
        h, working = gated_scan(
            gate,
            gate * new.tanh(),
            state_BC=None if state is None else state.carried,
            reset_BT=context.reset_BT,
            implementation=self.scan.function,
        )
        if state is not None:
            state.carried = working
        gist, gamma_h = self.read(h.to(o.dtype)).chunk(2, dim=-1)
        return torch.lerp(gist, o, (gamma_x + gamma_h).sigmoid())

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """The same at every length, once a token has been seen."""
        numbers = 2 * self.n_heads * self.key_dim * (self.head_dim + 1) + self.memory_dim
        return numbers * max(dtype.itemsize, torch.float32.itemsize) if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        heads = 2 * self.n_heads
        rule = chunked_flops(n_tokens, self.chunk_size, heads, heads, self.key_dim, self.head_dim + 1)
        linears = [x for x in (self.down, self.qk_up, self.v_up, self.write, self.read, self.out) if x is not None]
        return rule + sum(linear.flops(n_tokens) for linear in linears)

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}


def _phi(u: torch.Tensor) -> torch.Tensor:
    """1 + u + u^2 / 2, the exponential to second order."""
    return torch.addcmul(1 + u, u, u, value=0.5)


def _scaled(table, scale: float):
    return table if scale == 1 else tuple(x * scale for x in table)


def _decay_bias(n_heads: int) -> torch.Tensor:
    """(H,) such that sigmoid(b)^(1/16) has half-lives from HALF_LIVES[0] to HALF_LIVES[1] tokens, geometrically."""
    first, last = (math.log(x) for x in HALF_LIVES)
    half_life = torch.exp(torch.linspace(first, last, n_heads, dtype=torch.float64))
    log_sigmoid = -DECAY_ROOT * math.log(2) / half_life
    return (log_sigmoid - torch.log(-torch.expm1(log_sigmoid))).float()
