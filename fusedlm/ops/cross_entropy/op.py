"""Public function of soft-capped cross entropy."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.cross_entropy import reference
from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX, SigmoidCap, check_cap

SOFTCAP_CROSS_ENTROPY = Op(
    "softcap_cross_entropy",
    [
        Backend("triton", "fusedlm.ops.cross_entropy.triton:softcap_cross_entropy", needs_triton),
        Backend("reference", reference.softcap_cross_entropy, fused=False),
    ],
)


def softcap_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    cap: float | SigmoidCap | None = None,
    n_classes: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    reduction: str = "none",
    in_place: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Negative log likelihood of each target under softmax(cap * tanh(logits / cap)), in nats.

    With the reduction "mean" or "sum" the kernel computes the gradient with the loss, in one pass over the logits. It
    can then be used once.

    Args:
        logits: (N, V) of any float dtype; the arithmetic is float32 or better.
        targets: (N,) int64 in [0, n_classes), or ignore_index for rows that are ignored. Any other target is an error
            of the caller: an IndexError of the reference on the CPU, a loss of NaN from the kernel.
        cap: soft cap (Gemma 2, arXiv 2408.00118), or a SigmoidCap, which takes its place; None: none.
        n_classes: columns from here on are padding, with probability 0; None: V.
        ignore_index: as in torch; with another value than -100, -100 is an invalid target like any other.
        z_loss: coefficient of the squared log normaliser, which is added (PaLM, arXiv 2204.02311, section 5).
        reduction: "none", "sum", or "mean" over the rows that are not ignored (NaN when all are).
        in_place: a reduced loss may overwrite the logits with its gradient.
        backend: auto, triton or reference.

    Returns:
        (N,) float32 (float64 for float64 logits), 0 where ignored; () with a reduction.

    Raises:
        ValueError: the shapes do not match, the reduction is none of the three, the cap is not positive, or the backend
            cannot run this call.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (N, V) and (N,)")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction {reduction!r} must be 'none', 'sum' or 'mean'")
    check_cap(cap)
    n_classes = logits.shape[-1] if n_classes is None else n_classes
    run = resolve("softcap_cross_entropy", backend, logits)
    return run(logits, targets, cap, n_classes, z_loss, reduction, in_place, ignore_index)
