"""Matrix products inside operators, before and after kernels."""

import torch


def matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in dtype. For a float32 result of 16-bit operands the float32 accumulator is not rounded in between."""
    with torch.autocast(a.device.type, enabled=False):  # which would still apply inside an operator
        if dtype == torch.float32 != a.dtype and a.device.type == "cuda" and a.numel():
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a, b).to(dtype)


def cast_weight(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight in the dtype of x, contiguous."""
    return weight.to(x.dtype).contiguous()
