"""The distribution of the next token and sampling from it, on the CPU in float64."""

import math

import torch


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
    highest = logits.max()
    if not torch.isfinite(highest):
        raise ValueError(
            "the logits are not finite; the weights are damaged or diverged, or values overflow in this precision"
        )
    # Subtract the maximum before dividing: a tiny temperature then gives -inf for the others, and never NaN.
    shifted = logits - highest
    probabilities = torch.exp(shifted / temperature) if temperature > 0 else (shifted == 0).double()
    if temperature == 0:
        top_k = 1
    if top_k is not None or top_p is not None:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        if top_k is not None:
            ordered[top_k:] = 0
        if top_p is not None:
            before = ordered.cumsum(0) - ordered
            ordered[before >= top_p * ordered.sum()] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, ids, ordered)
    return probabilities / probabilities.sum()


def sample(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """One id drawn from probabilities (vocab,) float64 by inverting the cumulative sum: exactly one random number per
    token, on every device and in every version of torch."""
    cumulative = probabilities.cumsum(0)
    u = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    # right=True gives the first id whose cumulative sum exceeds u: an id of probability 0 is never drawn.
    return int(torch.searchsorted(cumulative, u, right=True))
