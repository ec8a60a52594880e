"""The entry to projection and soft-capped cross entropy in one."""

import torch

from fusedlm.ops.common import Implementation, Op, needs_triton
from fusedlm.ops.linear_softcap_cross_entropy import reference

LINEAR_SOFTCAP_CROSS_ENTROPY = Op(
    "linear_softcap_cross_entropy",
    [
        Implementation(
            "chunked",
            "fusedlm.ops.linear_softcap_cross_entropy.chunked:linear_softcap_cross_entropy",
            lambda setting, **shape: needs_triton(setting),
        ),
        Implementation("reference", reference.linear_softcap_cross_entropy, lambda setting, **shape: None),
    ],
)


def linear_softcap_cross_entropy(
    x_ND, weight_VD, targets_N, token_weights_N=None, *, cap=None, n_classes=None, z_loss=0.0, implementation=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of weighted losses of targets under softmax(cap * tanh(x weight^T / cap)), in nats.

    The gradients of x and weight are made with the loss, so the weights of the tokens must be known by then: 1/n for a
    mean over n tokens. They can be asked for once. Several heads or losses are several calls.

    Args:
        x_ND: (N, D) of any float dtype, which is that of the products; the arithmetic on logits is float32 or better.
        weight_VD: (V, D), rounded to the dtype of x; its gradient has its own dtype.
        targets_N: (N,) int64 in [0, n_classes), or -100 for tokens that count nothing.
        token_weights_N: (N,) or () float32 without a gradient; None: 1.
        cap, n_classes, z_loss: as of softcap_cross_entropy.
        implementation: what `LINEAR_SOFTCAP_CROSS_ENTROPY.choose(...).function` gave; None: the reference.

    Returns:
        The sum () and the losses (N,), 0 where ignored and without a gradient, both float32 (float64 for float64 x).

    Raises:
        ValueError: the shapes do not go together, or the weights of tokens want a gradient.
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
        raise ValueError("token_weights get no gradient; detach them")
    implementation = implementation or reference.linear_softcap_cross_entropy
    return implementation(
        x_ND,
        weight_VD,
        targets_N,
        token_weights_N.expand(len(x_ND)),
        cap,
        len(weight_VD) if n_classes is None else n_classes,
        z_loss,
    )
