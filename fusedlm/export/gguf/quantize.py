"""The types of GGUF that tensors are written in."""

import numpy as np
import torch

from fusedlm.ops.mx import reference as mx
from fusedlm.ops.quantized.reference import MXFP4, quantize

BLOCK = 32  # elements of a row that share a scale, of Q8_0 and MXFP4
# (type of matrices, type of embedding and head, general.file_type) by name; the numbers are those of llama.cpp.
TYPES = {
    "float32": ("F32", "F32", 0),
    "float16": ("F16", "F16", 1),
    "bfloat16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "mxfp4": ("MXFP4", "Q8_0", 38),
}
_OUTER = ("token_embd.weight", "output.weight")
_FLOAT32 = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "ssm_norm.weight", "ssm_a", "ssm_d")


def type_of(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Matrices have the requested type, or float16 where a row is no multiple of the block; vectors, routers
    and convolutions are float32."""
    if len(shape) < 2 or name.partition(".")[2].partition(".")[2] in _FLOAT32:
        return "F32"
    matrices, outer, _ = TYPES[dtype]
    kind = outer if name in _OUTER else matrices
    return "F16" if kind in ("Q8_0", "MXFP4") and shape[-1] % BLOCK else kind


def encoded(name: str, tensor: torch.Tensor, kind: str) -> np.ndarray:
    """The bytes of a tensor, or the values in a type of NumPy.

    Raises:
        ValueError: values are beyond the range of the type.
    """
    tensor = tensor.float().contiguous()
    if kind == "F32":
        return tensor.numpy()
    if kind == "F16":
        found = tensor.half()
        if tensor.isfinite().all() and not found.isfinite().all():
            raise ValueError(f"--dtype float16: tensor {name} has values beyond its range; use bfloat16 or float32")
        return found.numpy()
    if kind == "BF16":
        return tensor.bfloat16().view(torch.uint8).numpy()
    return (_q8_0 if kind == "Q8_0" else _mxfp4)(tensor).numpy()


def _q8_0(tensor: torch.Tensor) -> torch.Tensor:
    """Per block a float16 scale, the largest magnitude over 127, and 32 signed bytes."""
    blocks = tensor.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0)
    # Away from zero at ties, as llama.cpp rounds.
    codes = (codes.abs() + 0.5).floor().mul(codes.sign()).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=-1).flatten(-2)


def _mxfp4(tensor: torch.Tensor) -> torch.Tensor:
    """Per block the scale, E8M0 as in the standard, and 16 bytes: element i in the low half of byte i, element 16 + i
    in its high half. A weight that was rounded to MXFP4 before stays as it is."""
    weight = quantize(tensor.flatten(0, -2), "mxfp4", BLOCK)
    codes = mx.unpack(weight.codes, MXFP4).unflatten(-1, (-1, 2, BLOCK // 2)).to(torch.uint8)
    packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
    blocks = torch.cat([weight.scales[..., None], packed], dim=-1).flatten(1)
    return blocks.unflatten(0, tensor.shape[:-1])
