"""Projection to a vocabulary and soft-capped cross entropy, for three vocabularies."""

import torch

from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.linear_cross_entropy import chunked, reference

CAP = 15.0
SAMPLED = 512  # tokens, and rows of the gradient of the weight, that are compared


def _liger(module):
    def run(x, weight, targets, token_weights):
        losses = module.LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, targets, None, None, -100, 0.0, 0.0, "mean", CAP
        )
        return losses[0] if isinstance(losses, tuple) else losses

    return run


def _cut(module):
    def run(x, weight, targets, token_weights):
        return module.linear_cross_entropy(x, weight, targets, softcap=CAP, reduction="mean")

    return run


def problems(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    n, width, dim = shape
    x = torch.randn(n, dim, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(width, dim, device=device) / dim**0.5).to(dtype).requires_grad_()
    targets = torch.randint(width, (n,), device=device)
    token_weights = torch.full((n,), 1 / n, device=device)

    def eager(*inputs):
        return reference.linear_softcap_cross_entropy(*inputs, CAP, width, 0.0)[0]

    def fused(*inputs):
        return chunked.linear_softcap_cross_entropy(*inputs, CAP, width, 0.0)[0]

    def exact():
        """The sum, and gradients of the first tokens and the first rows of the weight, a chunk of tokens at a time."""
        total, dx, dw = 0.0, [], 0.0
        w = weight.detach().double()
        for start in range(0, n, SAMPLED):
            chunk = slice(start, start + SAMPLED)
            leaf, rows = x[chunk].detach().double().requires_grad_(), w[:SAMPLED].clone().requires_grad_()
            full = torch.cat([rows, w[SAMPLED:]])
            loss = reference.linear_softcap_cross_entropy(
                leaf, full, targets[chunk], token_weights[chunk], CAP, width, 0.0
            )[0]
            gradients = torch.autograd.grad(loss, (leaf, rows))
            total, dw = total + loss.detach(), dw + gradients[1]
            if not dx:
                dx.append(gradients[0])
        return [total, dx[0], dw]

    common = {
        "op": "linear_softcap_cross_entropy",
        "shape": " × ".join(map(str, shape)),
        "dtype": dtype,
        "leaves": [x, weight, targets, token_weights],
        "contenders": available(
            eager=eager,
            torch_compile=torch.compile(eager),
            Liger=peer("liger_kernel.ops.fused_linear_cross_entropy", _liger, waits_for_device=True),
            cut_cross_entropy=peer("cut_cross_entropy", _cut, waits_for_device=True),
            fusedlm=fused,
        ),
        "sample": lambda found: [found[0], *(gradient[:SAMPLED] for gradient in found[1:])],
    }
    product = 2 * n * width * dim
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=x.nbytes + weight.nbytes, n_flops=product, **common),
        Problem(
            upstream=torch.ones((), device=device),
            exact=exact,
            n_bytes=2 * (x.nbytes + weight.nbytes),
            n_flops=3 * product,
            **common,
        ),
    ]


OP = Op(
    "linear_softcap_cross_entropy",
    shapes=[(65536, 1024, 512), (16384, 50304, 1024), (8192, 152064, 2048)],
    quick_shapes=[(9, 300, 16)],
    problems=problems,
)
