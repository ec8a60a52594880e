"""Gated delta net (arXiv 2412.06464), the linear-time mixer of Qwen3-Next."""

import torch
import torch.nn.functional as F

from fusedlm.nn.context import Context, first_tokens
from fusedlm.nn.conv import ShortConv
from fusedlm.nn.decay import LogRate, StepBias
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import Module, OpUse, Role
from fusedlm.nn.norm import GatedRMSNorm
from fusedlm.nn.recurrent_state import RecurrentState, hold
from fusedlm.ops import gated_delta_rule


class GatedDeltaNet(Module):
    """q, k and v pass a short convolution and SiLU, and q and k are L2-normalised; per head, with a_t, b_t linear in x,
    alpha_t = exp(-exp(A_log) softplus(a_t + dt_bias)) and beta_t = sigmoid(b_t),

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  y_t = S_t q_t / sqrt(head_dim),

    and the output is W_o (norm(y) silu(z)), the norm per head.
    """

    branch_end = "out"

    def __init__(
        self,
        *,
        dim: int,
        n_heads: int,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-6,
        layer: int = 0,
        value_sources: set | None = None,
    ):
        super().__init__()
        self.n_heads = n_heads
        self.key_dim = head_dim or dim // n_heads
        self.value_dim = value_head_dim or self.key_dim
        self.chunk_size = chunk_size
        keys, values = n_heads * self.key_dim, n_heads * self.value_dim
        self.qkv = Linear(dim, 2 * keys + values, splits={"q": keys, "k": keys, "v": values})
        scales = (self.key_dim**-0.5, 1.0)  # of q and k
        self.conv = ShortConv([keys, keys, values], conv_size, head_dim=self.key_dim, head_scales=scales)
        self.gates = Linear(dim, 2 * n_heads, splits={"a": n_heads, "b": n_heads})
        self.z = Linear(dim, values)
        self.norm = GatedRMSNorm(self.value_dim, norm_eps)
        self.out = Linear(values, dim, zero=True)
        self.add_parameter("log_rate", (n_heads,), Role("per_head"), LogRate())  # A_log
        self.add_parameter("dt_bias", (n_heads,), Role("per_head"), StepBias())

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        return False  # three projections read x

    def forward(self, x_BTD, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        memory, tail = (None, None) if state is None else (state.memory, state.carried)
        projected = self.qkv(x_BTD)
        parts, next_tail = self.conv(projected, context, tail)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in parts)
        step, strength = self.gates(x_BTD).to(self.log_rate.dtype).chunk(2, dim=-1)
        log_decay = -self.log_rate.exp() * F.softplus(step + self.dt_bias)
        beta = strength.sigmoid()
        valid_BT, reset_BT = context.valid_BT, context.reset_BT
        in_place = state is not None and state.in_place
        y, after = self._rule(q, k, v, log_decay, beta, memory, reset_BT, valid_BT, in_place)
        if state is not None:

            def replay(memory, tail, n_kept_B):
                kept_BT = first_tokens(n_kept_B, k.shape[1])
                tail = self.conv.tail_after(projected, tail, n_kept_B)
                return self._rule(k, k, v, log_decay, beta, memory, reset_BT, kept_BT)[1], tail

            state.update(after, next_tail, replay)
        return self.out(self.norm(y, self.z(x_BTD)))

    def _rule(self, q, k, v, log_decay, beta, memory, reset_BT, taken_BT, in_place=False):
        """Outputs and the state after the tokens taken (None: all); the others leave it as it is. in_place: memory
        becomes that state."""
        reset_BT, log_decay, beta = hold(taken_BT, reset_BT, log_decay, beta)
        return gated_delta_rule(
            q,
            k,
            v,
            log_decay,
            beta,
            state_BHKV=memory,
            reset_BT=reset_BT,
            chunk_size=self.chunk_size,
            in_place=in_place,
            backend=self.backend("gated_delta_rule"),
        )

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Independent of the length from the first token on."""
        memory = self.n_heads * self.key_dim * self.value_dim * max(dtype.itemsize, torch.float32.itemsize)
        return (memory + self.conv.state_bytes(dtype)) if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        """Of the rule as it is defined, token by token: the value recalled by k, the write and the read by q."""
        rule = 3 * 2 * self.n_heads * self.key_dim * self.value_dim * n_tokens
        return rule + sum(linear.flops(n_tokens) for linear in (self.qkv, self.gates, self.z, self.out))

    def saved_elements(self) -> float:
        """The convolution's output, values less what the state predicts, outputs before the norm and, per chunk, the
        state, the inverse of the triangular system and, of wide keys, scores."""
        per_chunk = self.key_dim * self.value_dim / self.chunk_size + self.chunk_size * (1 + (self.key_dim > 64))
        return self.qkv.out_features + self.n_heads * (2 * self.value_dim + per_chunk)

    def rope_specs(self) -> set[tuple[int, float]]:
        return set()

    def ops(self, device: torch.device) -> list[OpUse]:
        rule = OpUse("gated_delta_rule", "gated_delta_rule", {"key_dim": self.key_dim, "value_dim": self.value_dim})
        return [self.conv.op(), rule, self.norm.op()]
