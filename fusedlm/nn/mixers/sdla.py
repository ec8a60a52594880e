"""Selective differential linear attention: linear time, and a state that does not grow."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fusedlm.nn.context import Context, first_tokens
from fusedlm.nn.linear import Linear, fuses_norm
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.recurrent_state import RecurrentState, hold
from fusedlm.ops import differential_linear_attention, gated_scan

DECAY_ROOT = 16  # the decay is this root of a sigmoid: a sigmoid near 1/2 then remembers tens of tokens
HALF_LIVES = 16.0, 1024.0  # tokens, of the first and the last head at the start


@dataclass(frozen=True)
class DecayBias:
    """(H,) such that sigmoid(b)^(1/16) has half-lives from HALF_LIVES[0] to HALF_LIVES[1] tokens, geometrically."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        first, last = (math.log(x) for x in HALF_LIVES)
        half_life = torch.exp(torch.linspace(first, last, *shape, dtype=torch.float64, device="cpu"))
        log_sigmoid = -DECAY_ROOT * math.log(2) / half_life
        return (log_sigmoid - torch.log(-torch.expm1(log_sigmoid))).float()


class SelectiveDifferentialLinearAttention(Module):
    """Two streams of linear attention, the second of which is subtracted from the first.

    Queries, keys and values come from one normalised latent c of `rank` elements per token. Each stream's query and key
    have rope_dim rotary dimensions more; the rotary key comes from x and is shared by the heads, as in `mla`. With
    K = head_dim + rope_dim and u = K^(-1/4) q or K^(-1/4) k, the feature map is phi(u) = 1 + u + u^2 / 2 >= 1/2
    elementwise, and per head and stream i

        S_t = a_t S_{t-1} + phi(k_t) v_t^T,  z_t = a_t z_{t-1} + phi(k_t),  o_i = S_t^T phi(q_t) / (z_t . phi(q_t)),

    with one decay for both streams, a_t = sigmoid(W_a x_t + b)^(1/16). The head's output is
    o = norm(o_1 - lambda_head lambda_layer o_2) (1 - lambda_init). The square root of
    YaRN's gain on scores multiplies the rotary dimensions of both sides.

    The working memory is as wide as one head: h_t = (1 - g_t) h_{t-1} + g_t tanh(W_h o_t) with g_t = sigmoid(W_g o_t);
    y = W_o (gamma o + (1 - gamma) W_m h) with gamma = sigmoid(W_gamma [x, h]).
    """

    branch_end = "out"

    def __init__(
        self,
        *,
        dim: int,
        n_heads: int,
        head_dim: int | None = None,
        rank: int | None = None,
        rope_dim: int = 16,
        rope_base: float = 10_000.0,
        lambda_init: float | None = None,
        memory: bool = True,
        chunk_size: int = 64,
        norm_eps: float = 1e-6,
        layer: int = 0,
        value_sources: set | None = None,
    ):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim or dim // n_heads
        self.rope = (rope_dim, rope_base)
        self.key_dim = self.head_dim + rope_dim
        self.chunk_size = chunk_size
        self.eps = norm_eps
        rank, heads = rank or max(1, dim // 4), n_heads * self.head_dim
        self.memory_dim = self.head_dim if memory else 0
        down = {"latent": rank, "k_rope": 2 * rope_dim, "decay": n_heads, "gamma": heads if memory else 0}
        self.down_widths = list(down.values())
        self.down = Linear(dim, sum(self.down_widths), splits=down)
        self.c_norm = RMSNorm(rank, norm_eps)
        qk = {"q": 2 * n_heads * self.key_dim, "k": 2 * n_heads * self.head_dim}
        self.qk_widths = list(qk.values())
        self.qk_up = Linear(rank, sum(self.qk_widths), splits=qk)
        self.v_up = Linear(rank, heads)
        self.add_parameter("decay_bias", (n_heads,), Role("bias"), DecayBias())
        start = initial_lambda(lambda_init, layer)
        self.add_parameter("lambda_head", (n_heads,), Role("lambda"), Constant(start))
        self.add_parameter("lambda_layer", (1,), Role("lambda"), Constant(1.0))
        self.add_constant("kept", 1 - start)
        self.add_parameter("head_norm", (self.head_dim,), Role("gain"), Constant(1.0))
        self.write = self.read = None
        if memory:
            self.write = Linear(heads, 2 * self.memory_dim, splits={"new": self.memory_dim, "gate": self.memory_dim})
            self.read = Linear(self.memory_dim, 2 * heads, splits={"gist": heads, "gamma": heads})
        self.out = Linear(heads, dim, zero=True)
        self.feature_scale = 1.0

    def widen_from(self, base: "SelectiveDifferentialLinearAttention") -> None:
        """Outputs are means over the K features of each key, so that the features themselves must keep their scale:
        K_base^(-1/4) in place of K^(-1/4)."""
        self.feature_scale = (self.key_dim / base.key_dim) ** 0.25

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        return fuses_norm(self.down, x_BTD)

    def forward(self, x_BTD, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        projected = self.down(x_BTD)
        latent, k_rope, decay, gamma_x = projected.split(self.down_widths, dim=-1)
        latent = self.c_norm(latent)
        qk = self.qk_up(latent)
        if self.feature_scale != 1.0:
            qk, k_rope = qk * self.feature_scale, k_rope * self.feature_scale
        q, k = (y.unflatten(-1, (2 * self.n_heads, -1)) for y in qk.split(self.qk_widths, dim=-1))
        k_rope, v = k_rope.unflatten(-1, (2, self.rope[0])), self.v_up(latent).unflatten(-1, (self.n_heads, -1))
        wide = torch.promote_types(decay.dtype, torch.float32)
        log_decay = F.logsigmoid(decay.to(wide) + self.decay_bias) / DECAY_ROOT
        streams, rope = (q, k, k_rope, v, log_decay), self._rope(context)
        sums, working = (None, None) if state is None else (state.memory, state.carried)
        valid_BT, reset_BT = context.valid_BT, context.reset_BT
        in_place = state is not None and state.in_place
        o, sums_after = self._attend(*streams, rope, sums, reset_BT, valid_BT, in_place)
        o = o.flatten(-2).to(projected.dtype)
        scanned = None
        if self.read is not None:
            new, gate = self.write(o).chunk(2, dim=-1)
            gate = gate.sigmoid()
            scanned = (gate, gate * new.tanh())
            h, working = self._scan(*scanned, working, reset_BT, valid_BT, in_place)
            gist, gamma_h = self.read(h.to(o.dtype)).chunk(2, dim=-1)
            o = torch.lerp(gist, o, (gamma_x + gamma_h).sigmoid())
        if state is not None:

            def replay(sums, working, n_kept_B):
                kept_BT = first_tokens(n_kept_B, k.shape[1])
                if scanned is not None:
                    working = self._scan(*scanned, working, reset_BT, kept_BT)[1]
                return self._attend(*streams, rope, sums, reset_BT, kept_BT)[1], working

            state.update(sums_after, working, replay)
        return self.out(o)

    def _rope(self, context: Context) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The table of rotations, times the square root of YaRN's gain on scores; None without rotary dimensions."""
        if not self.rope[0]:
            return None
        gain = math.sqrt(context.scale_scores(1.0, self.rope[0]))
        cos, sin = context.rope[self.rope]
        return (cos, sin) if gain == 1 else (cos * gain, sin * gain)

    def _attend(self, q, k, k_rope, v, log_decay, rope, sums, reset_BT, taken_BT, in_place=False):
        """Outputs of the heads (B, T, H, V), and the sums of both streams after the tokens taken (None: all). in_place:
        the given sums become these."""
        return differential_linear_attention(
            q,
            k,
            k_rope,
            v,
            log_decay,
            self.lambda_head * self.lambda_layer,
            self.head_norm * self.kept,
            rope=rope,
            eps=self.eps,
            state_BNKE=sums,
            reset_BT=reset_BT,
            written_BT=taken_BT,
            chunk_size=self.chunk_size,
            in_place=in_place,
            backend=self.backend("differential_linear_attention"),
        )

    def _scan(self, gate, new, working, reset_BT, taken_BT, in_place=False):
        """The working memory at every token, and after the tokens taken (None: all). in_place: the given one becomes
        that."""
        reset_BT, gate, new = hold(taken_BT, reset_BT, gate, new)
        return gated_scan(
            gate, new, state_BC=working, reset_BT=reset_BT, in_place=in_place, backend=self.backend("gated_scan")
        )

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Independent of the length from the first token on."""
        elements = 2 * self.n_heads * self.key_dim * (self.head_dim + 1) + self.memory_dim
        return elements * max(dtype.itemsize, torch.float32.itemsize) if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        """Of both streams as they are defined, token by token: the write of sums and normaliser, and the read."""
        rule = 2 * 2 * 2 * self.n_heads * self.key_dim * (self.head_dim + 1) * n_tokens
        linears = [x for x in (self.down, self.qk_up, self.v_up, self.write, self.read, self.out) if x is not None]
        return rule + sum(linear.flops(n_tokens) for linear in linears)

    def saved_elements(self) -> float:
        """The difference of the streams before the norm, the second stream, states of both per chunk and, with a
        working memory, its input, gates and content."""
        heads = self.n_heads * self.head_dim
        states = 2 * heads * self.key_dim / self.chunk_size
        return 2 * heads + states + (heads + 4 * self.memory_dim if self.memory_dim else 0)

    def rope_specs(self) -> set[tuple[int, float]]:
        return {self.rope}

    def ops(self, device: torch.device) -> list[OpUse]:
        sizes = {"head_dim": self.head_dim, "value_dim": self.head_dim, "rope_dim": self.rope[0]}
        used = [OpUse("differential_linear_attention", "differential_linear_attention", sizes)]
        if self.read is not None:
            used.append(OpUse("gated_scan", "gated_scan", {}))
        return [*used, self.down.norm_op()]
