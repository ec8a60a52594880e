"""Soft-capped cross entropy in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


class SigmoidCap(NamedTuple):
    """scale * sigmoid((logits + shift) / width), an asymmetric cap of the logits."""

    scale: float
    shift: float
    width: float


def check_cap(cap: float | SigmoidCap | None) -> None:
    """Raises ValueError unless the cap, or scale and width of a SigmoidCap, are positive."""
    sizes = cap._asdict() if isinstance(cap, SigmoidCap) else {"cap": cap}
    for name, size in sizes.items():
        if size is not None and name != "shift" and size <= 0:
            raise ValueError(f"{name}={size}: a cap of logits must be positive")


def softcap(logits: torch.Tensor, cap: float | SigmoidCap | None) -> torch.Tensor:
    """cap * tanh(logits / cap) in float32 or better (Gemma 2, arXiv 2408.00118), or that of SigmoidCap; None: the
    logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap is None:
        return logits
    if isinstance(cap, SigmoidCap):
        return cap.scale * torch.sigmoid((logits + cap.shift) / cap.width)
    return cap * torch.tanh(logits / cap)


def softcap_cross_entropy(
    logits, targets, cap, n_classes, z_loss=0.0, reduction="none", in_place=False, ignore_index=IGNORE_INDEX
) -> torch.Tensor:
    """Losses (N,), 0 where ignored, or () their sum, or their mean over the rows that are not ignored. in_place is a
    permission, which is not used here."""
    logits = softcap(logits, cap)
    if n_classes < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= n_classes
        logits = logits.masked_fill(padding, float("-inf"))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square() * (targets != ignore_index)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum()
