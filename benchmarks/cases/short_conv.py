"""Short convolution with SiLU: of q, k and v of hybrid-350m and of a gated delta net like kepler-wiki, with the norm of
their heads, and of x, B and C of a mamba2 like it."""

import torch

from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.conv import reference, triton

TAPS = 4


def problems(shape: tuple[int, int, tuple[int, ...], int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    batch, tokens, widths, head_dim = shape
    channels = sum(widths)
    scales = (head_dim**-0.5, 1.0) if head_dim else ()
    layout = (True, widths, head_dim, scales)

    def draw(*size):
        return torch.randn(size, device=device)

    x = draw(batch, tokens, channels).to(dtype).requires_grad_()
    weight = (draw(TAPS, channels) / TAPS**0.5).requires_grad_()
    upstream = draw(batch, tokens, channels).to(dtype)

    def eager(x, weight):
        return reference.short_conv(x, weight, None, None, None, *layout)[0]

    def fused(x, weight):
        return triton.short_conv(x, weight, None, None, None, *layout)[0]

    def exact(with_gradients: bool):
        """Row by row, whose sums the weight's gradient has; all at once would not fit."""
        outputs, gradients, total = [], [], 0.0
        for row, up in zip(x.detach().split(1), upstream.split(1), strict=True):
            leaves = [row.double().requires_grad_(), weight.detach().double().requires_grad_()]
            parts = eager(*leaves)
            outputs.append([part.detach() for part in parts])
            if with_gradients:
                dx, dw = torch.autograd.grad(parts, leaves, up.double().split(widths, dim=-1))
                gradients.append(dx)
                total = total + dw
        parts = [torch.cat(part) for part in zip(*outputs, strict=True)]
        return [*parts, torch.cat(gradients), total] if with_gradients else parts

    common = {
        "op": "short_conv",
        "shape": f"{batch} × {tokens} × {' + '.join(map(str, widths))}, heads of {head_dim or 'no width'}",
        "dtype": dtype,
        "leaves": [x, weight],
        "contenders": available(
            eager=eager,
            torch_compile=torch.compile(eager),
            FLA=peer("fla.modules.causal_conv1d", lambda module: _fla(module, widths, head_dim)),
            fusedlm=fused,
        ),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // (2 * x.nbytes),  # three times the cache of an H100
    }
    return [
        Problem(upstream=None, exact=lambda: exact(False), n_bytes=2 * x.nbytes, **common),
        Problem(upstream=upstream, exact=lambda: exact(True), n_bytes=5 * x.nbytes, **common),
    ]


def _fla(module, widths, head_dim):
    """flash-linear-attention: a convolution and a norm of each part."""
    from fla.modules.norm.l2norm import l2norm

    def run(x, weight):
        y, _ = module.causal_conv1d(x, weight.flip(0).t().contiguous(), activation="silu")
        parts = list(y.split(widths, dim=-1))
        if head_dim:
            q, k = (l2norm(part.unflatten(-1, (-1, head_dim)).contiguous()).flatten(-2) for part in parts[:2])
            parts[:2] = q * head_dim**-0.5, k
        return tuple(parts)

    return run


OP = Op(
    "short_conv",
    shapes=[
        (16, 2048, (1280, 1280, 1280), 128),
        (32, 2048, (1024, 1024, 1024), 64),
        (32, 2048, (2048, 64, 64), 0),
    ],
    quick_shapes=[(2, 5, (16, 16, 12), 8)],
    problems=problems,
)
