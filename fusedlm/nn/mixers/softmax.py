"""What the softmax mixers share: which attention op runs on expanded keys and values."""

from dataclasses import replace

import torch

from fusedlm.config.model import ImplConfig
from fusedlm.nn.context import Context
from fusedlm.ops.attention.op import CAUSAL, PACKED, causal_attention, packed_attention
from fusedlm.ops.common import Choice, Setting


class SoftmaxAttention:
    """Causal or packed attention over whole sequences, the implementation of each chosen once."""

    def __init__(
        self,
        impl: ImplConfig,
        setting: Setting,
        *,
        head_dim: int,
        value_dim: int,
        window: int | None = None,
        role: str = "",
    ):
        """role: put before the names of the ops where a mixer has a second attention of other widths."""
        self.window, self.role = window, role
        self.causal = CAUSAL.choose(impl.attention, setting, head_dim=head_dim, value_dim=value_dim)
        self.packed = PACKED.choose(impl.packed_attention, setting, head_dim=head_dim, value_dim=value_dim)

    @property
    def choices(self) -> list[Choice]:
        return [replace(choice, op=self.role + choice.op) for choice in (self.causal, self.packed)]

    def __call__(self, q_BTHD, k_BTGD, v_BTGE, scale: float, context: Context) -> torch.Tensor:
        windowed = self.window is not None and q_BTHD.shape[1] > self.window
        if not context.packed and not windowed:
            return causal_attention(q_BTHD, k_BTGD, v_BTGE, scale=scale, implementation=self.causal.function)
        return packed_attention(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            scale=scale,
            positions_BT=context.positions_BT,
            window=self.window,
            boundaries=context.boundaries,
            implementation=self.packed.function,
        )


def attention_flops(n_tokens: int, window: int | None, n_heads: int, head_dim: int, value_dim: int) -> int:
    """Scores and weighted values over a whole sequence; causal attention is counted in full, as torch's counter does,
    and a window as the blocks of two windows that are computed."""
    if window is None or n_tokens <= 2 * window:
        pairs = n_tokens * n_tokens
    else:
        pairs = -(-n_tokens // window) * window * 2 * window
    return 2 * n_heads * (head_dim + value_dim) * pairs
