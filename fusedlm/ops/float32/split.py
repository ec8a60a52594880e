"""The projection on tensor cores of 16 bits: float32 values as sums of bfloat16 ones (arXiv 1904.06376).

The 24 bits of a float32 value are those of three bfloat16 values, whose sum it is. Their products with bfloat16 x are
exact in float32, in which they are summed: the result is that of float32 arithmetic, but for the sums. The parts are
rows of one product. The gradient of x is rounded to bfloat16, for which two parts of each are enough.
"""

import torch

from fusedlm.ops.common.products import matmul
from fusedlm.ops.float32 import reference

_LEAST_ROWS = 64  # below, as in decoding, the parts take longer to make than a product in float32


@torch.library.custom_op("fusedlm::split_product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b^T of bfloat16 matrices in dtype, with float32 sums."""
    if a.device.type == "cpu":  # which would round the sums before the conversion
        return (a.float() @ b.float().t()).to(dtype)
    return matmul(a, b.t(), dtype)


@_product.register_fake
def _(a, b, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def parts_of(x: torch.Tensor, n: int) -> list[torch.Tensor]:
    """n bfloat16 tensors, each the leading bits of what the ones before it leave of float32 x."""
    found = []
    for _ in range(n):
        # By its bits: a compiler may leave out the rounding of x.bfloat16().float(), and the rest would be 0.
        leading = (x.view(torch.int32) & -(2**16)).view(torch.float32)
        found.append(leading.bfloat16())
        x = x - leading
    return found


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NK, weight_MK):
        ctx.save_for_backward(x_NK, weight_MK)
        y = _product(x_NK, torch.cat(parts_of(weight_MK.float(), 3)), torch.float32)
        first, second, third = y.chunk(3, -1)
        return first + (second + third)

    @staticmethod
    def backward(ctx, dy_NM):
        x_NK, weight_MK = ctx.saved_tensors
        d_1, d_2, d_3 = parts_of(dy_NM, 3)
        w_1, w_2 = parts_of(weight_MK.float(), 2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            rows, columns = torch.cat([d_1, d_1, d_2], 1), torch.cat([w_1, w_2, w_1]).t()
            dx = _product(rows, columns, x_NK.dtype)
        if ctx.needs_input_grad[1]:
            dw = _product(torch.cat([d_1, d_2, d_3], 1).t(), x_NK.t(), torch.float32)
            first, second, third = dw.chunk(3)
            dw = (first + (second + third)).to(weight_MK.dtype)
        return dx, dw


def float32_linear(x, weight) -> torch.Tensor:
    rows = x.flatten(0, -2)
    if rows.shape[0] < _LEAST_ROWS:
        return reference.float32_linear(x, weight)
    return _Float32Linear.apply(rows, weight).view(*x.shape[:-1], weight.shape[0])
