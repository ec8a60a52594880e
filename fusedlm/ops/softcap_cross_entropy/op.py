"""The entry to soft-capped cross entropy."""

import torch

from fusedlm.ops.common import Implementation, Op
from fusedlm.ops.softcap_cross_entropy import reference
from fusedlm.ops.softcap_cross_entropy.reference import IGNORE_INDEX, softcap

__all__ = ["IGNORE_INDEX", "SOFTCAP_CROSS_ENTROPY", "softcap", "softcap_cross_entropy"]

SOFTCAP_CROSS_ENTROPY = Op(
    "softcap_cross_entropy",
    [Implementation("reference", reference.softcap_cross_entropy, lambda setting, **shape: None)],
)


def softcap_cross_entropy(logits, targets, *, cap=None, n_classes=None, implementation=None) -> torch.Tensor:
    """Negative log likelihood of each target under softmax(cap * tanh(logits / cap)), in nats.

    Args:
        logits: (N, V) of any float dtype; the arithmetic is float32 or better.
        targets: (N,) int64 in [0, n_classes), or IGNORE_INDEX (-100) for rows that count nothing.
        cap: soft cap; None for none.
        n_classes: classes from here on are padding, with probability 0; None: V.
        implementation: what `SOFTCAP_CROSS_ENTROPY.choose(...).function` gave; None: the reference.

    Returns:
        (N,) float32 (float64 for float64 logits), 0 where ignored.
    """
    implementation = implementation or reference.softcap_cross_entropy
    return implementation(logits, targets, cap, logits.shape[-1] if n_classes is None else n_classes)
