"""Which drafted tokens are kept, so that the text has the distribution of the model: rejection sampling (Leviathan et
al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)."""

import torch

from fusedlm.generation.sampling import Sampling, draw, probabilities
from fusedlm.generation.steps import at
from fusedlm.ops.draw.reference import invert

MOST_DRAFTS = 32  # of a step


def accept(
    logits_BTV: torch.Tensor,
    drafts_BK: torch.Tensor,
    draft_p_BKV: torch.Tensor | None,
    uniform_BT: torch.Tensor | None,
    sampling: Sampling,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens of each row, from K drafts and the logits of the model at these. Nothing waits for the device.

    With p the probabilities of the model after temperature, top_k and top_p, and q those that a draft was drawn from,
    it is kept with the probability min(1, p / q). The token after the last kept one comes from max(0, p - q),
    normalised, or from p when all were kept. With temperature 0 drafts are kept while they are the most likely token.

    Args:
        logits_BTV: (B, K + 1, V): at place j of the token after the first j drafts.
        drafts_BK: (B, K) int64, draft j drawn from draft_p_BKV[:, j].
        draft_p_BKV: (B, K, V) float64; None with temperature 0.
        uniform_BT: (B, K + 1) float64 random numbers in [0, 1); None with temperature 0.

    Returns:
        (B, K + 1) int64 tokens, and (B,) the number n of drafts kept: the first n + 1 tokens of a row count, the last
        of which is -1 where the logits are not finite.
    """
    n_drafts, vocab = drafts_BK.shape[1], logits_BTV.shape[2]
    if sampling.temperature == 0:
        tokens_BT = draw(logits_BTV.flatten(0, 1), None, sampling).view(-1, n_drafts + 1)
        return tokens_BT, _first_run(tokens_BT[:, :-1] == drafts_BK)
    p_BTV = probabilities(logits_BTV.flatten(0, 1), sampling).view(-1, n_drafts + 1, vocab)
    index_BK1 = drafts_BK[..., None]
    p_BK, q_BK = (x.gather(2, index_BK1)[..., 0] for x in (p_BTV[:, :-1], draft_p_BKV))
    n_kept_B = _first_run(uniform_BT[:, :-1] * q_BK < p_BK)
    p_BV = at(p_BTV, n_kept_B)
    q_BV = at(torch.cat([draft_p_BKV, torch.zeros_like(p_BTV[:, :1])], dim=1), n_kept_B)
    rest_BV = (p_BV - q_BV).clamp(min=0)
    total_B1 = rest_BV.sum(-1, keepdim=True)
    # Equal distributions have no rest; a draft of theirs is rejected by rounding alone.
    last_B = invert(torch.where(total_B1 == 0, p_BV, rest_BV), uniform_BT[:, -1])
    last_B = last_B.masked_fill((total_B1 - total_B1 != 0)[:, 0], -1)
    tokens_BT = torch.cat([drafts_BK, last_B[:, None]], dim=1)
    return tokens_BT.scatter(1, n_kept_B[:, None], last_B[:, None]), n_kept_B


def _first_run(kept_BK: torch.Tensor) -> torch.Tensor:
    """(B,) int64, how many are True before the first False."""
    return kept_BK.long().cumprod(1).sum(1)


class Speculation:
    """Speculative decoding with so many drafts per step, and how many of them were kept.

    draft_tokens: K.
    steps: of all rows; each gives at least one token.
    accepted: steps in which the first draft was kept, the first two, and so on.
    """

    def __init__(self, draft_tokens: int):
        """
        Raises:
            ValueError: it is not an integer from 1 to 32.
        """
        is_integer = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool)
        if not is_integer or not 1 <= draft_tokens <= MOST_DRAFTS:
            raise ValueError(f"speculate={draft_tokens!r} must be an integer from 1 to {MOST_DRAFTS}, drafts per step")
        self.draft_tokens, self.steps = draft_tokens, 0
        self.accepted = [0] * draft_tokens

    def count(self, n_kept: int) -> None:
        """Count a step of a row."""
        self.steps += 1
        for j in range(n_kept):
            self.accepted[j] += 1

    def acceptance(self) -> list[float]:
        """By position, the fraction of steps in which this draft and all before it were kept."""
        return [n / max(self.steps, 1) for n in self.accepted]

    def tokens_per_step(self) -> float:
        """Tokens of a row in a step, its end aside."""
        return 1 + sum(self.acceptance())
