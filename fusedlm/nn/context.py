"""What a mixer knows about its tokens: positions, documents, the number of earlier tokens."""

from dataclasses import dataclass, field

import torch

from fusedlm.nn.rope import RopeTable, YaRN, rope_table, yarn_score_gain


@dataclass
class Context:
    """One for a forward pass, shared by all layers.

    positions_BT: (B or 1, T) int64, the index of each token in its document.
    packed: whether documents may begin inside; when not, positions are known to be consecutive and nothing is masked.
    past: tokens in the state before these, in the row that has the most.
    starts_B: (B,) int64, tokens in the state before these; None: `past` in every row.
    slots_B: (B,) int64, the places of these tokens in the caches of a static state (`State.slots`), (B, T) of several
        tokens per row; None: not static.
    lengths_B: (B,) int64, how many of the T tokens each row has, the rest being padding; None: all.
    prompts: whether these are the tokens of prompts, which have other numbers at every call.
    select: (n,) int64, which of the B * T tokens the head computes and metrics count; None: all.
    boundaries: cumulative document lengths (N + 1,) int32 over the B * T tokens, and the longest; for the
        variable-length kernels on the GPU, None elsewhere.
    rope: one table for each (dim, base) that the model's mixers use.
    score_gain: factor on the attention scores of mixers with rotary embedding; not 1 with YaRN.
    first_values: values of the first layers with a value residual, by mixer type and width.
    value_rows_BTW: (B, T, W) rows of the value embedding's table; None: the model has none.
    """

    positions_BT: torch.Tensor
    packed: bool = False
    past: int = 0
    starts_B: torch.Tensor | None = None
    slots_B: torch.Tensor | None = None
    lengths_B: torch.Tensor | None = None
    prompts: bool = False
    select: torch.Tensor | None = None
    boundaries: tuple[torch.Tensor, int] | None = None
    rope: dict[tuple[int, float], RopeTable] = field(default_factory=dict)
    score_gain: float = 1.0
    first_values: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    value_rows_BTW: torch.Tensor | None = None

    @property
    def valid_BT(self) -> torch.Tensor | None:
        """(B, T) bool, which tokens are no padding; None: all."""
        if self.lengths_B is None:
            return None
        return first_tokens(self.lengths_B, self.positions_BT.shape[1])

    @property
    def reset_BT(self) -> torch.Tensor | None:
        """(B, T) bool, first tokens of documents; None when there are none inside."""
        return self.positions_BT == 0 if self.packed else None

    def visible_before(self, window: int | None = None) -> torch.Tensor | None:
        """(B or 1, T) int64, how many earlier tokens each token sees; None for a single token that sees all there
        are."""
        if self.positions_BT.shape[1] == 1 and not self.packed and (self.starts_B is None or window is None):
            return None
        return self.positions_BT if window is None else self.positions_BT.clamp(max=window - 1)

    def add_rope(
        self, specs: set[tuple[int, float]], dtype: torch.dtype, yarn: YaRN | None = None, of_next=None
    ) -> None:
        """Tables of all (dim, base). of_next: gives them for the next tokens of a static state; None: computed."""
        for dim, base in sorted(specs):
            if of_next is None:
                self.rope[dim, base] = rope_table(self.positions_BT, dim, base, dtype, yarn)
            else:
                self.rope[dim, base] = of_next(dim, base, dtype, yarn)
        self.score_gain = yarn_score_gain(yarn)

    def scale_scores(self, scale: float, rope_dim: int) -> float:
        """The scale of a mixer's scores, with YaRN's gain when it has rotary dimensions."""
        return scale * self.score_gain if rope_dim else scale


def first_tokens(n_B: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """(B, T) bool, the first n_B[b] of T tokens of row b."""
    return torch.arange(n_tokens, device=n_B.device) < n_B[:, None]


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


def row_boundaries(batch_size: int, n_tokens: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """`boundaries` of rows that are one document each; known without asking the device."""
    end = batch_size * n_tokens
    return torch.arange(0, end + 1, n_tokens, dtype=torch.int32, device=device), n_tokens
