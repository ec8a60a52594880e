"""Public function of the projection of one token."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.one_token import reference

ACTIVATIONS = ("relu2", "swiglu")

TOKEN_LINEAR = Op(
    "token_linear",
    [
        Backend("triton", "fusedlm.ops.one_token.triton:token_linear", needs_triton),
        Backend("reference", reference.token_linear, fused=False),
    ],
)


def token_linear(
    x,
    weight_ED,
    *,
    gain_D=None,
    eps: float = 1e-6,
    activation: str | None = None,
    slope: float = 0.0,
    residual=None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """residual + f(x) weight^T for decoding, where one token alone is multiplied: f is RMSNorm (arXiv 1910.07467), an
    activation, or nothing.

    Args:
        x: (..., D) of any float dtype; (..., 2 D), gate first, with swiglu. f is computed in float32 or better.
        weight_ED: (E, D).
        gain_D: (D,) gain of the norm; None: no norm.
        eps: of the norm.
        activation: "relu2": leaky_relu(x, slope)^2; "swiglu": silu(gate) * up; None: none.
        slope: of the leaky ReLU below zero.
        residual: (..., E), which is added; None: nothing.
        dtype: of the output, and of the matrix product by the reference; None: that of x.
        backend: auto, triton or reference. The kernel of triton takes one token and has no backward pass; for more
            tokens and with gradients it runs the reference.

    Returns:
        (..., E).

    Raises:
        ValueError: the shapes do not match, the activation is unknown or comes with a norm, or the backend cannot run
            this call.
    """
    if activation is not None and (activation not in ACTIVATIONS or gain_D is not None):
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}, and without a gain")
    width = x.shape[-1] // (2 if activation == "swiglu" else 1) if x.ndim else 0
    shapes = f"x {tuple(x.shape)} and weight {tuple(weight_ED.shape)}"
    if weight_ED.ndim != 2 or not width or weight_ED.shape[1] != width or (activation == "swiglu" and x.shape[-1] % 2):
        raise ValueError(f"{shapes} must be (..., D), or (..., 2 D) with swiglu, and (E, D)")
    if gain_D is not None and gain_D.shape != (width,):
        raise ValueError(f"gain {tuple(gain_D.shape)} must be ({width},)")
    if residual is not None and residual.shape != (*x.shape[:-1], weight_ED.shape[0]):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(*x.shape[:-1], weight_ED.shape[0])}")
    dtype = dtype or x.dtype
    run = resolve("token_linear", backend, x, dtype=dtype)
    return run(x, weight_ED, gain_D, float(eps), activation, float(slope), residual, dtype)
