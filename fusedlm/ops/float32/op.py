"""Public function of projections in float32."""

import torch

from fusedlm.ops.common import Backend, Call, Op, resolve
from fusedlm.ops.float32 import reference


def _needs_tensor_cores(call: Call) -> str | None:
    if call.device.type != "cuda" or call.capability < (8, 0):
        return "needs a CUDA device of capability 8.0 or newer"
    return None if call.dtype == torch.bfloat16 else "needs bfloat16 activations"


FLOAT32_LINEAR = Op(
    "float32_linear",
    [
        Backend("split", "fusedlm.ops.float32.split:float32_linear", _needs_tensor_cores),
        Backend("reference", reference.float32_linear, fused=False),
    ],
)


def float32_linear(x, weight_MK, *, backend: str = "auto") -> torch.Tensor:
    """x W^T in float32, as the scores of a router need it, of activations in 16 bits.

    `split` computes it on tensor cores of 16 bits, from all 24 bits of the weight, and rounds the gradient of x once,
    to the dtype of x. Tensor cores truncate their float32 sums, so that errors grow with the terms: on an H100 to 2e-6
    of the output with 2,048 columns, and to 4e-6 of the weight's gradient with 4,096 tokens, ten times those of
    products in float32.

    Args:
        x: (..., K), of any float dtype up to float32.
        weight_MK: (M, K), the same.
        backend: auto, split or reference.

    Returns:
        (..., M) float32.

    Raises:
        ValueError: the sizes do not match, or the backend cannot run this call.
    """
    if x.ndim < 2 or weight_MK.ndim != 2 or x.shape[-1] != weight_MK.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight_MK.shape)} must be (..., N, K) and (M, K)")
    return resolve("float32_linear", backend, x)(x, weight_MK)
