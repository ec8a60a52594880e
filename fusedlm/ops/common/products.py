"""Matrix products around kernels, inside operators."""

import torch


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in dtype, straight from the float32 accumulator where dtype is float32 and the operands are narrower."""
    with torch.autocast(a.device.type, enabled=False):  # which would still apply inside an operator
        if dtype == torch.float32 != a.dtype and a.device.type == "cuda" and a.numel():
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a, b).to(dtype)


def rounded(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A weight as a product with x takes it."""
    return weight.to(x.dtype).contiguous()
