"""The distribution of the next token and drawing from it, in float64: of one row on the CPU, or of a batch on any
device, without waiting for it."""

import math
from dataclasses import dataclass

import torch

from fusedlm.ops import draw_token
from fusedlm.ops.draw.reference import checked, invert, weights_of

NOT_FINITE = "the logits are not finite; the weights are damaged or diverged, or values overflow in this precision"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: see `next_token_probabilities`."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises:
    ValueError: a value is out of range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be a finite number of at least 0 (0: the most likely token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None for all tokens")


def next_token_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Probabilities (vocab,) float64 on the CPU, from logits (vocab,) of any dtype and device.

    Temperature first, then the top_k most likely tokens, then the nucleus (arXiv 1904.09751): the fewest most likely
    tokens whose probability, renormalised after top_k, reaches top_p; at least one. The result sums to 1. Ties go to
    the lower id. Temperature 0 gives the most likely token probability 1.

    Raises:
        ValueError: a value is out of range, or a logit is NaN or +inf, or all are -inf.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.detach().double().cpu()
    if not torch.isfinite(logits.max()):
        raise ValueError(NOT_FINITE)
    weights = _weights(logits[None], temperature, top_k, top_p)[0]
    return weights / weights.sum()


def sample(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """One id drawn from probabilities (vocab,) float64 by inverting the cumulative sum: exactly one random number per
    token, on every device and in every version of torch."""
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return int(invert(probabilities[None], uniform[None])[0])


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor | None, sampling: Sampling) -> torch.Tensor:
    """One token for each row, (B,) int64 on the device of the logits, which is not waited for: what `sample` gives for
    `next_token_probabilities` and a random number in [0, 1). -1 where these raise an error.

    Args:
        logits_BV: (B, V) of any float dtype, -inf for ids that are never drawn.
        uniform_B: (B,) float64 random numbers; None with temperature 0.
    """
    if sampling.temperature == 0 or (sampling.top_k is None and sampling.top_p is None):
        return draw_token(logits_BV, uniform_B, temperature=sampling.temperature)
    weights_BV = _weights(logits_BV.double(), sampling.temperature, sampling.top_k, sampling.top_p)
    return checked(invert(weights_BV, uniform_B), logits_BV.amax(-1))


def probabilities(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(B, V) float64 on the device of the logits, what `next_token_probabilities` gives for each row; NaN where it
    raises an error."""
    weights_BV = _weights(logits_BV.double(), sampling.temperature, sampling.top_k, sampling.top_p)
    return weights_BV / weights_BV.sum(-1, keepdim=True)


def _weights(logits_BV: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Unnormalised probabilities (B, V) from float64 logits."""
    if temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    weights_BV = weights_of(logits_BV, temperature)
    if top_k is None and top_p is None:
        return weights_BV
    n = weights_BV.shape[-1] if top_k is None else min(top_k, weights_BV.shape[-1])
    largest = weights_BV.topk(n).values if n < weights_BV.shape[-1] else weights_BV.sort(descending=True).values
    n_kept_B1 = torch.full_like(largest[:, :1], n, dtype=torch.int64)
    if top_p is not None:
        cumulative = largest.cumsum(-1)
        n_kept_B1 = (cumulative - largest < top_p * cumulative[:, -1:]).sum(-1, keepdim=True).clamp(min=1)
    least_B1 = largest.gather(-1, n_kept_B1 - 1)
    above, equal = weights_BV > least_B1, weights_BV == least_B1
    first_equal = equal & (equal.cumsum(-1) <= n_kept_B1 - above.sum(-1, keepdim=True))
    return weights_BV.masked_fill(~(above | first_equal), 0.0)
