"""Mamba 2, the structured state-space model with a scalar decay per head (arXiv 2405.21060)."""

import torch
import torch.nn.functional as F

from fusedlm.nn.context import Context, first_tokens
from fusedlm.nn.conv import ShortConv
from fusedlm.nn.decay import LogRate, StepBias
from fusedlm.nn.linear import Linear, fuses_norm
from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.norm import GatedRMSNorm
from fusedlm.nn.recurrent_state import RecurrentState, hold
from fusedlm.ops import decayed_linear_attention


class Mamba2(Module):
    """x, B and C pass a short convolution and SiLU; with dt = softplus(dt + bias) and a = exp(-dt exp(A_log)) per head

        S_t = a_t S_{t-1} + B_t (dt_t x_t)^T,  y_t = S_t^T C_t + D x_t,

    and the output is W_o norm(y silu(z)), one norm per group of heads that share B and C, as in the published models
    with several groups. The convolution has no bias; the published one has."""

    branch_end = "out"

    def __init__(
        self,
        *,
        dim: int,
        n_heads: int,
        head_dim: int | None = None,
        state_dim: int = 64,
        n_groups: int = 1,
        conv_size: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-6,
        layer: int = 0,
        value_sources: set | None = None,
    ):
        super().__init__()
        self.n_heads, self.n_groups = n_heads, n_groups
        self.head_dim = head_dim or 2 * dim // n_heads
        self.state_dim = state_dim
        self.chunk_size = chunk_size
        inner, keys = n_heads * self.head_dim, n_groups * state_dim
        self.widths = [inner, inner + 2 * keys, n_heads]  # z; x, B and C; dt
        splits = {"z": inner, "x": inner, "B": keys, "C": keys, "dt": n_heads}
        self.project = Linear(dim, sum(splits.values()), splits=splits)
        self.conv = ShortConv([inner, keys, keys], conv_size)
        self.add_parameter("log_rate", (n_heads,), Role("per_head"), LogRate())  # A_log
        self.add_parameter("dt_bias", (n_heads,), Role("per_head"), StepBias())
        self.add_parameter("skip", (n_heads,), Role("per_head"), Constant(1.0))  # D
        self.norm = GatedRMSNorm(inner // n_groups, norm_eps, n_groups=n_groups, gate_first=True)
        self.out = Linear(inner, dim, zero=True)

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        return fuses_norm(self.project, x_BTD)

    def forward(self, x_BTD, context: Context, state: RecurrentState | None = None) -> torch.Tensor:
        memory, tail = (None, None) if state is None else (state.memory, state.carried)
        z, projected, dt = self.project(x_BTD).split(self.widths, dim=-1)
        (x, b, c), next_tail = self.conv(projected, context, tail)
        x = x.unflatten(-1, (self.n_heads, -1))
        b, c = (y.unflatten(-1, (self.n_groups, -1)) for y in (b, c))
        dt = F.softplus(dt.to(self.log_rate.dtype) + self.dt_bias)
        value, log_decay = (x * dt[..., None]).to(x.dtype), -self.log_rate.exp() * dt
        reset_BT = context.reset_BT
        in_place = state is not None and state.in_place
        y, after = self._rule(c, b, value, log_decay, memory, reset_BT, context.valid_BT, in_place)
        if state is not None:

            def replay(memory, tail, n_kept_B):
                kept_BT = first_tokens(n_kept_B, b.shape[1])
                tail = self.conv.tail_after(projected, tail, n_kept_B)
                return self._rule(b, b, value, log_decay, memory, reset_BT, kept_BT)[1], tail

            state.update(after, next_tail, replay)
        return self.out(self.norm(y, z, x, self.skip))

    def _rule(self, c, b, value, log_decay, memory, reset_BT, taken_BT, in_place=False):
        """Outputs and the state after the tokens taken (None: all); the others leave it as it is. in_place: memory
        becomes that state."""
        reset_BT, value, log_decay = hold(taken_BT, reset_BT, value, log_decay)
        return decayed_linear_attention(
            c,
            b,
            value,
            log_decay,
            state_BHKV=memory,
            reset_BT=reset_BT,
            chunk_size=self.chunk_size,
            in_place=in_place,
            backend=self.backend("decayed_linear_attention"),
        )

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> RecurrentState:
        return RecurrentState()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Independent of the length from the first token on."""
        memory = self.n_heads * self.state_dim * self.head_dim * max(dtype.itemsize, torch.float32.itemsize)
        return (memory + self.conv.state_bytes(dtype)) if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        """Of the rule as it is defined, token by token: the write of the state and the read."""
        rule = 2 * 2 * self.n_heads * self.state_dim * self.head_dim * n_tokens
        return rule + self.project.flops(n_tokens) + self.out.flops(n_tokens)

    def saved_elements(self) -> float:
        """The convolution's output, values times their step, outputs before the norm, and a state per chunk."""
        inner = self.n_heads * self.head_dim
        return 3 * inner + 2 * self.n_groups * self.state_dim + inner * self.state_dim / self.chunk_size

    def rope_specs(self) -> set[tuple[int, float]]:
        return set()

    def ops(self, device: torch.device) -> list[OpUse]:
        sizes = {"key_dim": self.state_dim, "value_dim": self.head_dim}
        rule = OpUse("decayed_linear_attention", "decayed_linear_attention", sizes)
        return [self.project.norm_op(), self.conv.op(), rule, self.norm.op()]
