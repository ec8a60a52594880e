"""Both streams of sdla at the sizes of kepler-wiki: heads of 64 columns, 16 rotary dimensions."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.differential_linear import reference, triton

EPS, ROPE = 1e-6, 16
# Features and states are rounded to bfloat16, which eager PyTorch does not: it computes in float32. In the gradient of
# `weight` terms of opposite signs nearly cancel: the two saved tensors, rounded, change it by up to 4e-2.
MIN_BOUND, WEIGHT_BOUND = 2e-2, 5e-2


def problems(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    batch, tokens, heads, width = shape
    scale = (width + ROPE) ** -0.25

    def draw(*size):
        return torch.randn(size, device=device).to(dtype)

    q, k = draw(batch, tokens, 2 * heads, ROPE + width), draw(batch, tokens, 2 * heads, width)
    k_rope, v = draw(batch, tokens, 2, ROPE), draw(batch, tokens, heads, width)
    log_decay = -0.07 * torch.rand(batch, tokens, heads, device=device) * 10 ** (-2 * torch.rand(heads, device=device))
    weight, gamma = torch.full((heads,), 0.4, device=device), 1 + 0.1 * torch.randn(width, device=device)
    angle = torch.arange(tokens, device=device)[None, :, None, None] * torch.rand(ROPE // 2, device=device)
    rope = (angle.cos(), angle.sin())
    leaves = [x.requires_grad_() for x in (q, k, k_rope, v, log_decay, weight, gamma)]
    upstream = draw(batch, tokens, heads, width)

    def eager(*leaves):
        tables = tuple(x.to(leaves[4].dtype) for x in rope)
        return reference.differential_linear_attention(*leaves, tables, scale, EPS, None, None, None, 64)[0]

    def fused(*leaves):
        return triton.differential_linear_attention(*leaves, rope, scale, EPS, None, None, None)[0]

    def exact():
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        out = eager(*doubles)
        return [out.detach(), *torch.autograd.grad(out, doubles, upstream.double())]

    inputs = sum(x.nbytes for x in leaves)
    states = batch * -(-tokens // 64) * 2 * heads * (width + ROPE) * width * dtype.itemsize
    common = {
        "op": "differential_linear_attention",
        "shape": " × ".join(map(str, shape)),
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(eager=eager, torch_compile=torch.compile(eager), fusedlm=fused),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // inputs,  # three times the cache of an H100
    }
    bound, weight_bound = (MIN_BOUND, WEIGHT_BOUND) if dtype != torch.float32 else (5e-5, 5e-5)
    bounds = [bound] + [weight_bound if x is weight else bound for x in leaves]
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=inputs + v.nbytes, min_bound=bound, **common),
        Problem(
            upstream=upstream,
            exact=exact,
            n_bytes=3 * inputs + 2 * v.nbytes + 2 * states,
            min_bound=bounds,
            **common,
        ),
    ]


OP = Op(
    "differential_linear_attention",
    shapes=[(32, 2048, 16, 64), (1, 65536, 16, 64)],
    quick_shapes=[(1, 70, 2, 16)],
    problems=problems,
)
