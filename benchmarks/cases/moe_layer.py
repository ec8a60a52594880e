"""A mixture of experts with its router: scores, choice, dispatch, experts and their sum, beside a dense feed-forward.

The logits of a token are a permutation of multiples of 1/16, so that every precision chooses the same experts.
"""

import torch
import torch.nn.functional as F

from benchmarks.cases import feed_forward
from benchmarks.cases.peers import available
from benchmarks.cases.routed_experts import SAMPLED_ROWS, grouped
from benchmarks.harness import Op, Problem
from fusedlm.nn.ffn.router import highest, normalised_scores
from fusedlm.ops import float32_linear
from fusedlm.ops.experts import reference, triton
from fusedlm.ops.swiglu import reference as dense_reference
from fusedlm.ops.swiglu import triton as dense


def _routing(logits, top_k: int):
    indices = highest(logits.detach().sigmoid(), top_k)
    return indices, normalised_scores(logits.gather(-1, indices))


def problems(shape: tuple, device, dtype) -> list[Problem]:
    """shape: (N, D, H, E, k)."""
    n, dim, hidden, n_experts, top_k = shape

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype)

    x = draw(n, dim)
    order = torch.rand(n, n_experts, device=device).argsort(-1)
    x[:, :n_experts] = ((order - n_experts // 2) / 16).to(dtype)
    leaves = [
        x,
        draw(n_experts, 2 * hidden, dim, scale=dim**-0.5),
        draw(n_experts, dim, hidden, scale=hidden**-0.5),
        torch.eye(n_experts, dim, device=device),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    upstream = draw(n, dim)

    def eager(x, w_up, w_down, w_router):
        wide = torch.promote_types(x.dtype, torch.float32)
        indices, weights = _routing(F.linear(x.to(wide), w_router.to(wide)), top_k)
        return reference.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)

    def library(x, w_up, w_down, w_router):
        indices, weights = _routing(F.linear(x.float(), w_router), top_k)
        return grouped(x, w_up, w_down, weights, indices)

    def fused(x, w_up, w_down, w_router):
        indices, weights = _routing(float32_linear(x, w_router), top_k)
        return triton.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)

    eager.waits_for_device = True  # for the sizes of the groups

    def exact():
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        out = eager(*wide)
        return sample([out.detach(), *torch.autograd.grad(out, wide, upstream.double())])

    def sample(found):
        return [a[: feed_forward.SAMPLED] if a.ndim == 2 else a[:, :SAMPLED_ROWS] for a in found]

    has_grouped = dtype == torch.bfloat16 and device.type == "cuda"
    label = f"{n} × {dim} × {hidden}, {n_experts} experts, top {top_k}"
    common = {
        "op": "moe_layer",
        "shape": label,
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(
            eager=eager,
            grouped_mm_torch_compile=torch.compile(library, dynamic=False) if has_grouped else None,
            fusedlm=torch.compile(fused, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager"),
        ),
        "sample": sample,
    }
    n_bytes = sum(leaf.nbytes for leaf in leaves) + upstream.nbytes
    n_flops = 6 * n * top_k * hidden * dim + 2 * n * n_experts * dim
    size = (n, dim, top_k * hidden)
    same_size = ", dense of the same active size"
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=n_bytes, n_flops=n_flops, **common),
        Problem(upstream=upstream, exact=exact, n_bytes=2 * n_bytes, n_flops=3 * n_flops, **common),
        *feed_forward.problems(
            "moe_layer", dense_reference.swiglu_mlp, dense.swiglu_mlp, 2, size, device, dtype, same_size
        ),
    ]


OP = Op(
    "moe_layer",
    shapes=[(16384, 2048, 1536, 64, 6), (16384, 2048, 768, 128, 8)],
    quick_shapes=[(40, 16, 24, 4, 2)],
    problems=problems,
)
