"""What a mixer knows of the tokens it is given: positions, documents, how many came before."""

from dataclasses import dataclass, field

import torch

from fusedlm.config.model import YaRNConfig
from fusedlm.nn.rope import RopeTable, rope_table, yarn_score_gain


@dataclass
class Context:
    """One for a forward pass, shared by all layers.

    positions_BT: (B or 1, T) int64, the index of each token in its document.
    packed: whether documents may begin inside; when not, positions are known to be consecutive and nothing is masked.
    n_past: tokens in the state before these.
    boundaries: cumulative document lengths (N + 1,) int32 over the B * T tokens, and the longest; for the
        variable-length kernels on the GPU, None elsewhere.
    rope: one table for each (dim, base) that the model's mixers use.
    score_gain: factor on the attention scores of mixers with rotary embedding; not 1 with YaRN.
    first_values: what the first layers with a value residual publish for later ones, by type and width.
    """

    positions_BT: torch.Tensor
    packed: bool = False
    n_past: int = 0
    boundaries: tuple[torch.Tensor, int] | None = None
    rope: dict[tuple[int, float], RopeTable] = field(default_factory=dict)
    score_gain: float = 1.0
    first_values: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    @property
    def reset_BT(self) -> torch.Tensor | None:
        """(B, T) bool, first tokens of documents; None when there are none inside."""
        return self.positions_BT == 0 if self.packed else None

    def add_rope(self, specs: set[tuple[int, float]], dtype: torch.dtype, yarn: YaRNConfig | None = None) -> None:
        for dim, base in sorted(specs):
            self.rope[dim, base] = rope_table(self.positions_BT, dim, base, dtype, yarn)
        self.score_gain = yarn_score_gain(yarn)

    def scale_scores(self, scale: float, rope_dim: int) -> float:
        """The scale of a mixer's scores, with YaRN's gain when it has rotary dimensions."""
        return scale * self.score_gain if rope_dim else scale


def document_positions(documents_BT, last_document_B=None, next_position_B=None) -> torch.Tensor:
    """(B, T) int64 index of each token in its document; a document begins where the number changes.

    last_document_B and next_position_B, both (B,), continue the last document of an earlier call.
    """
    n_tokens = documents_BT.shape[1]
    index = torch.arange(n_tokens, device=documents_BT.device).expand_as(documents_BT)
    begins = torch.ones_like(documents_BT, dtype=torch.bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    if last_document_B is not None:
        begins[:, 0] = documents_BT[:, 0] != last_document_B
    start = torch.where(begins, index, -1).cummax(dim=1).values
    if next_position_B is None:
        return index - start
    return torch.where(start < 0, next_position_B[:, None] + index, index - start)


def varlen_boundaries(positions_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cumulative lengths of the documents of all rows, padded with empty ones to a multiple of 64: few shapes."""
    starts = (positions_BT.flatten() == 0).nonzero().flatten()
    cumulative = torch.full((-(-(starts.numel() + 1) // 64) * 64,), positions_BT.numel(), device=positions_BT.device)
    cumulative[: starts.numel()] = starts
    return cumulative.to(torch.int32), positions_BT.shape[1]


def row_boundaries(batch_size: int, n_tokens: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """The same when every row is one document."""
    end = batch_size * n_tokens
    return torch.arange(0, end + 1, n_tokens, dtype=torch.int32, device=device), n_tokens
