"""Public function of soft-target distillation from the inputs of two heads."""

import torch

from fusedlm.ops.common import Backend, Op, resolve
from fusedlm.ops.cross_entropy.reference import SigmoidCap, check_cap
from fusedlm.ops.distillation import chunked, reference

LINEAR_DISTILLATION = Op(
    "linear_distillation",
    [
        Backend("chunked", chunked.linear_distillation),
        Backend("reference", reference.linear_distillation, fused=False),
    ],
)


def linear_distillation(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    token_weights_N: torch.Tensor | None,
    teacher_x_NE: torch.Tensor,
    teacher_weight_UE: torch.Tensor,
    *,
    cap: float | SigmoidCap | None = None,
    teacher_cap: float | SigmoidCap | None = None,
    n_classes: int | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum over tokens of T^2 KL(q || p), in nats, with p = softmax(cap(x weight^T) / T) of the student and
    q = softmax(teacher_cap(teacher_x teacher_weight^T) / T) of the teacher (Hinton et al., arXiv 1503.02531; T^2 keeps
    gradients of about one size). KL is the cross entropy of the soft targets less their entropy, which has no gradient.

    The teacher gets no gradient. The gradients of x and weight are computed with the loss, so the weights of the tokens
    must be known by then. They can be used once.

    Args:
        x_ND, teacher_x_NE: (N, D), (N, E) of any float dtype, in which the matrix products are computed; the arithmetic
            on logits is in float32, or float64 for float64 x.
        weight_VD, teacher_weight_UE: (V, D), (U, E), cast to the dtypes of their inputs.
        targets_N: (N,) int64; a token counts unless its target is -100.
        token_weights_N: (N,) or () factor of each divergence, without a gradient; None: 1.
        cap, teacher_cap: as in softcap_cross_entropy.
        n_classes: rows of both weights from here on are padding, with probability 0; None: V, which must be U.
        temperature: T, greater than 0.
        backend: auto, chunked or reference. Chunked never holds all logits of either head.

    Returns:
        The weighted sum (), and KL(q || p) of each token (N,), not times T^2, 0 where it does not count, without a
        gradient. Both float32, or float64 for float64 x.

    Raises:
        ValueError: the shapes do not match, token_weights require a gradient, a cap or the temperature is not positive.
    """
    for name, h, w in (("x", x_ND, weight_VD), ("teacher_x", teacher_x_NE, teacher_weight_UE)):
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1] or targets_N.shape != h.shape[:1]:
            shapes = f"{name} {tuple(h.shape)}, its weight {tuple(w.shape)} and targets {tuple(targets_N.shape)}"
            raise ValueError(f"{shapes} must be (N, D), (V, D) and (N,)")
    rows = (weight_VD.shape[0], teacher_weight_UE.shape[0])
    if n_classes is None and rows[0] != rows[1]:
        raise ValueError(f"weights of {rows[0]} and {rows[1]} rows: give n_classes, the number that both predict")
    n_classes = rows[0] if n_classes is None else n_classes
    if not 1 <= n_classes <= min(rows):
        raise ValueError(f"n_classes={n_classes} must be between 1 and the rows of the weights, {min(rows)}")
    if token_weights_N is None:
        token_weights_N = torch.ones((), device=x_ND.device)
    elif token_weights_N.shape not in ((), targets_N.shape):
        raise ValueError(f"token_weights {tuple(token_weights_N.shape)} must be () or {tuple(targets_N.shape)}")
    elif token_weights_N.requires_grad:
        raise ValueError("token_weights require a gradient and get none; detach them")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0")
    check_cap(cap)
    check_cap(teacher_cap)
    token_weights_N = token_weights_N.to(torch.promote_types(x_ND.dtype, torch.float32))
    teacher_x_NE, teacher_weight_UE = teacher_x_NE.detach(), teacher_weight_UE.detach()
    run = resolve("linear_distillation", backend, x_ND)
    return run(
        x_ND, weight_VD, targets_N, token_weights_N, teacher_x_NE, teacher_weight_UE,
        cap, teacher_cap, n_classes, float(temperature),
    )  # fmt: skip
