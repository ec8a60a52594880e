"""The next token in plain PyTorch, in float64."""

import torch

_LOWEST_TEMPERATURE = 1e-300  # below, its inverse, by which GPUs multiply, would be infinite
LARGEST_FRACTION = 1 - 1e-12  # of a cumulative sum, so that the last token exceeds it whatever the rounding


def weights_of(logits_BV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Unnormalised probabilities, the highest 1; temperature above 0."""
    # Subtract the maximum before dividing: a tiny temperature then gives -inf for the others, and never NaN.
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    return torch.exp(shifted_BV if temperature == 1 else shifted_BV / max(temperature, _LOWEST_TEMPERATURE))


def invert(weights_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first id of each row whose cumulative weight exceeds the uniform fraction of the sum."""
    cumulative = weights_BV.cumsum(-1)
    fraction = uniform_B[:, None].clamp(max=LARGEST_FRACTION) * cumulative[:, -1:]
    # Parallel sums may rise a little where the weight is 0.
    return ((cumulative > fraction) & (weights_BV > 0)).byte().argmax(-1)


def checked(tokens_B: torch.Tensor, highest_B: torch.Tensor) -> torch.Tensor:
    """-1 where the highest logit is not finite."""
    return tokens_B.masked_fill(highest_B - highest_B != 0, -1)  # infinity and NaN minus themselves are NaN


def draw_token(logits_BV, uniform_B, temperature: float) -> torch.Tensor:
    highest_B, tokens_B = logits_BV.max(-1)
    if temperature > 0:
        tokens_B = invert(weights_of(logits_BV.double(), temperature), uniform_B)
    return checked(tokens_B, highest_B)
