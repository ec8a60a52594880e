"""Attention over full sequences, causal or packed, as the softmax mixers share it."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.module import Module, OpUse
from fusedlm.ops import causal_attention, packed_attention


class SoftmaxAttention(Module):
    """Causal attention over full sequences; packed where documents begin inside or a window is shorter.

    role: prefix of the ops' names where a mixer has a second attention with other widths.
    """

    def __init__(self, head_dim: int, value_dim: int, window: int | None = None, role: str = ""):
        super().__init__()
        self.sizes = {"head_dim": head_dim, "value_dim": value_dim}
        self.window, self.role = window, role

    def forward(self, q_BTHD, k_BTGD, v_BTGE, scale: float, context: Context) -> torch.Tensor:
        windowed = self.window is not None and q_BTHD.shape[1] > self.window
        if not context.packed and not windowed:
            return causal_attention(
                q_BTHD, k_BTGD, v_BTGE, scale=scale, varying=context.prompts, backend=self.backend("attention")
            )
        return packed_attention(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            scale=scale,
            positions_BT=context.positions_BT,
            window=self.window,
            boundaries=context.boundaries,
            backend=self.backend("packed_attention"),
        )

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse(self.role + op, op, self.sizes) for op in ("attention", "packed_attention")]


def widened_scale(scale: float, base: float) -> float:
    """The scale of scores, K^-1/2 for keys of width K, in the maximal update parametrisation: sqrt(K_base) / K. Queries
    and keys that have learnt from each other have products that grow as K, not as its square root (arXiv 2203.03466,
    definition 4.1); normalised ones too."""
    return scale if scale == base else scale * (scale / base)


def attention_flops(n_tokens: int, window: int | None, n_heads: int, head_dim: int, value_dim: int) -> int:
    """Scores and weighted values over a full sequence. Causal attention is counted in full (PaLM, arXiv 2204.02311,
    appendix B), as n_tokens keys for each token; with a window, as that many."""
    keys = n_tokens if window is None else min(n_tokens, window)
    return 2 * n_heads * (head_dim + value_dim) * n_tokens * keys
