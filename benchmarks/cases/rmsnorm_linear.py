"""RMSNorm and five projections of its output: in training, and for the few tokens of decoding."""

import torch
import torch.nn.functional as F

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.norm_linear import triton

EPS = 1e-6
PROJECTIONS = 5
COPIES = 16  # of the weights in decoding: at least three times the cache of an H100


def eager_packed(x, gamma, weight):
    return F.linear(F.rms_norm(x, gamma.shape, gamma, EPS), weight)


def eager_separate(x, gamma, weight):
    """The gradients of the five projections are then concatenated, in a small fraction of the time."""
    normed = F.rms_norm(x, gamma.shape, gamma, EPS)
    return tuple(F.linear(normed, part) for part in weight.unflatten(0, (PROJECTIONS, -1)).unbind())


def product_alone(x, gamma, weight):
    return F.linear(x, weight)


def problems(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    n, width = shape

    def draw(*size):
        return torch.randn(size, device=device)

    x = draw(n, width).to(dtype).requires_grad_()
    gamma = (1 + 0.3 * draw(width)).to(dtype).requires_grad_()
    weight = (draw(PROJECTIONS * width, width) / width**0.5).to(dtype).requires_grad_()
    upstream = draw(n, len(weight)).to(dtype)
    decoding = n <= triton.FEW_TOKENS

    def exact():
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x, gamma, weight)]
        out = eager_packed(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.double())]

    def packed(*leaves):
        return triton.packed_rmsnorm_linear(*leaves, EPS)

    def scaled(*leaves):
        return triton.rmsnorm_linear(*leaves, EPS)

    common = {
        "op": "rmsnorm_linear",
        "shape": f"{n} × {width} to {len(weight)}",
        "dtype": dtype,
        "leaves": [x, gamma, weight],
    }
    contenders = available(
        eager_packed=eager_packed,
        eager_separate=eager_separate,
        torch_compile=torch.compile(eager_packed),
        fusedlm=packed if decoding else None,
        fusedlm_packed=None if decoding else packed,
        fusedlm_triton=None if decoding else scaled,
    )
    common["contenders"] = contenders
    if decoding:
        return [_forward(exact, n_bytes=weight.nbytes, copies=COPIES, **common)]
    product, n_bytes = 2 * n * width * len(weight), x.nbytes + weight.nbytes + upstream.nbytes
    return [
        _forward(exact, n_bytes=n_bytes, n_flops=product, part=("product alone", product_alone), **common),
        Problem(
            upstream=upstream,
            exact=exact,
            sample=lambda found: [torch.cat(found[:-3], dim=-1), *found[-3:]],
            n_bytes=2 * n_bytes,
            n_flops=3 * product,
            **common,
        ),
    ]


def _forward(exact, **rest) -> Problem:
    return Problem(upstream=None, exact=lambda: exact()[:1], sample=lambda found: [torch.cat(found, dim=-1)], **rest)


OP = Op(
    "rmsnorm_linear",
    shapes=[(16384, 1024), (16384, 2048), *((n, width) for width in (1024, 2048) for n in (1, 4, 16))],
    quick_shapes=[(1, 16), (5, 16), (40, 16)],
    problems=problems,
)
