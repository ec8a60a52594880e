"""Public function of the projection to a vocabulary fused with soft-capped cross entropy."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.cross_entropy.reference import SigmoidCap, check_cap
from fusedlm.ops.linear_cross_entropy import reference

LINEAR_SOFTCAP_CROSS_ENTROPY = Op(
    "linear_softcap_cross_entropy",
    [
        Backend("chunked", "fusedlm.ops.linear_cross_entropy.chunked:linear_softcap_cross_entropy", needs_triton),
        Backend("reference", reference.linear_softcap_cross_entropy, fused=False),
    ],
)


def linear_softcap_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    token_weights_N: torch.Tensor | None = None,
    *,
    cap: float | SigmoidCap | None = None,
    n_classes: int | None = None,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the losses of targets under softmax(cap * tanh(x weight^T / cap)), in nats.

    The gradients of x and weight are computed with the loss, so the weights of the tokens must be known by then: 1/n
    for a mean over n tokens. The gradients can be used once. Call it once per head or loss.

    Args:
        x_ND: (N, D) of any float dtype, in which the matrix products are computed; the arithmetic on logits is float32
            or better.
        weight_VD: (V, D), cast to the dtype of x; its gradient has its own dtype.
        targets_N: (N,) int64 in [0, n_classes), or -100 for tokens that are ignored.
        token_weights_N: (N,) or () factor of each loss, without a gradient; None: 1.
        cap, n_classes, z_loss: as in softcap_cross_entropy.
        backend: auto, chunked or reference.

    Returns:
        The weighted sum () and the losses (N,), 0 where ignored and without a gradient, both float32 (float64 for
        float64 x).

    Raises:
        ValueError: the shapes do not match, token_weights require a gradient, the cap is not positive, or the backend
            cannot run this call.
    """
    shapes = f"x {tuple(x_ND.shape)}, weight {tuple(weight_VD.shape)} and targets {tuple(targets_N.shape)}"
    if x_ND.ndim != 2 or weight_VD.ndim != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"{shapes} must be (N, D), (V, D) and (N,)")
    if targets_N.shape != x_ND.shape[:1]:
        raise ValueError(f"{shapes} must be (N, D), (V, D) and (N,)")
    if token_weights_N is None:
        token_weights_N = torch.ones((), device=x_ND.device)
    elif token_weights_N.shape not in ((), targets_N.shape):
        raise ValueError(f"token_weights {tuple(token_weights_N.shape)} must be () or {tuple(targets_N.shape)}")
    elif token_weights_N.requires_grad:
        raise ValueError("token_weights require a gradient and get none; detach them")
    token_weights_N = token_weights_N.to(torch.promote_types(x_ND.dtype, torch.float32))
    check_cap(cap)
    n_classes = weight_VD.shape[0] if n_classes is None else n_classes
    run = resolve("linear_softcap_cross_entropy", backend, x_ND)
    return run(x_ND, weight_VD, targets_N, token_weights_N, cap, n_classes, z_loss)
