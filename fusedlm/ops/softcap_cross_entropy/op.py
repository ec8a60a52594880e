"""The entry to soft-capped cross entropy."""

import torch

from fusedlm.ops.common import Implementation, Op, needs_triton
from fusedlm.ops.softcap_cross_entropy import reference
from fusedlm.ops.softcap_cross_entropy.reference import IGNORE_INDEX, softcap

__all__ = ["IGNORE_INDEX", "SOFTCAP_CROSS_ENTROPY", "softcap", "softcap_cross_entropy"]


SOFTCAP_CROSS_ENTROPY = Op(
    "softcap_cross_entropy",
    [
        Implementation(
            "triton",
            "fusedlm.ops.softcap_cross_entropy.triton:softcap_cross_entropy",
            lambda setting, **shape: needs_triton(setting),
        ),
        Implementation("reference", reference.softcap_cross_entropy, lambda setting, **shape: None),
    ],
)


def softcap_cross_entropy(
    logits,
    targets,
    *,
    cap=None,
    n_classes=None,
    ignore_index=IGNORE_INDEX,
    z_loss=0.0,
    reduction="none",
    in_place=False,
    implementation=None,
) -> torch.Tensor:
    """Negative log likelihood of each target under softmax(cap * tanh(logits / cap)), in nats.

    With the reduction "mean" or "sum" the kernel makes the gradient with the loss, and reads the logits once.

    Args:
        logits: (N, V) of any float dtype; the arithmetic is float32 or better.
        targets: (N,) int64 in [0, n_classes), or ignore_index for rows that count nothing.
        cap: soft cap; None for none.
        n_classes: classes from here on are padding, with probability 0; None: V.
        z_loss: times the square of the log of the normaliser is added (PaLM, arXiv 2204.02311, section 5).
        reduction: "none", "sum", or "mean" over the rows that count (NaN when none does).
        in_place: allows a reduced loss to leave its gradient in the logits' memory; they then hold nothing else of use.
        implementation: what `SOFTCAP_CROSS_ENTROPY.choose(...).function` gave; None: the reference.

    Returns:
        (N,) float32 (float64 for float64 logits), 0 where ignored; () with a reduction.

    Raises:
        ValueError: the shapes do not go together, or the reduction is none of the three.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (N, V) and (N,)")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction {reduction!r} must be 'none', 'sum' or 'mean'")
    if ignore_index != IGNORE_INDEX:
        targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
    implementation = implementation or reference.softcap_cross_entropy
    n_classes = logits.shape[-1] if n_classes is None else n_classes
    return implementation(logits, targets, cap, n_classes, z_loss, reduction, in_place)
