"""SwiGLU feed-forward of routed experts with even and skewed loads, and a dense one of the same active size."""

import torch
import torch.nn.functional as F

from benchmarks.cases import feed_forward
from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.experts import reference, triton
from fusedlm.ops.swiglu import reference as dense_reference
from fusedlm.ops.swiglu import triton as dense

SAMPLED_ROWS = 16  # of the gradient of each expert's matrices


def _eager(x, w_up, w_down, weights, indices):
    return reference.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)


_eager.waits_for_device = True  # for the sizes of the groups


def grouped(x, w_up, w_down, weights, indices):
    """Sorted rows between torch's grouped products, as torchtitan has them."""
    experts, order = torch.sort(indices.flatten(), stable=True)
    ends = torch.searchsorted(experts, torch.arange(len(w_up), device=x.device), right=True, out_int32=True)
    tokens = order // indices.shape[1]
    gate, up = F.grouped_mm(x[tokens], w_up.transpose(1, 2), offs=ends).float().chunk(2, dim=-1)
    out = F.grouped_mm((F.silu(gate) * up).to(x.dtype), w_down.transpose(1, 2), offs=ends)
    weighted = (out * weights.flatten()[order][:, None]).to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, weighted)


def _sonic_moe(module):
    """Scores of any routing, as it takes them: one per token and expert, tokens in order."""
    from sonicmoe.enums import ActivationType

    def call(x, w_up, w_down, weights, indices):
        tokens = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(indices.shape[1])
        routing = weights.flatten().float(), tokens, indices.flatten().int()
        matrices = w_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0), None  # experts last, without biases
        stream = torch.cuda.current_stream().cuda_stream
        options = {"activation_type": ActivationType.SWIGLU, "concat_layout": True}  # gate, then up
        return module.moe_general_routing_inputs(x, *routing, *matrices, len(w_up), stream, **options)[0]

    return call


def _fused(x, w_up, w_down, weights, indices):
    return triton.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)


def problems(shape: tuple, device, dtype) -> list[Problem]:
    """shape: (N, D, H, E, k, skew). An expert's share of the tokens falls by exp(-skew) from the first to the last."""
    n, dim, hidden, n_experts, top_k, skew = shape

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(size, device=device)).to(dtype)

    gumbel = -torch.log(-torch.log(torch.rand(n, n_experts, device=device).clamp(1e-9, 1 - 1e-7)))
    scores, indices = (gumbel - skew * torch.arange(n_experts, device=device) / n_experts).topk(top_k)
    differentiable = [
        draw(n, dim),
        draw(n_experts, 2 * hidden, dim, scale=dim**-0.5),
        draw(n_experts, dim, hidden, scale=hidden**-0.5),
        scores.softmax(-1),
    ]
    leaves = [*(leaf.requires_grad_() for leaf in differentiable), indices]
    upstream = draw(n, dim)

    def exact():
        wide = [leaf.detach().double().requires_grad_() for leaf in differentiable]
        out = _eager(*wide, indices)
        return sample([out.detach(), *torch.autograd.grad(out, wide, upstream.double())])

    def sample(found):
        return [a[: feed_forward.SAMPLED] if a.ndim == 2 else a[:, :SAMPLED_ROWS] for a in found]

    has_grouped = dtype == torch.bfloat16 and device.type == "cuda"
    common = {
        "op": "routed_experts",
        "shape": f"{n} × {dim} × {hidden}, {n_experts} experts, top {top_k}, {'skewed' if skew else 'even'} loads",
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(
            eager=_eager,
            grouped_mm=grouped if has_grouped else None,
            grouped_mm_torch_compile=torch.compile(grouped, dynamic=False) if has_grouped else None,
            SonicMoE=peer("sonicmoe", _sonic_moe, waits_for_device=True) if has_grouped else None,
            fusedlm=_fused,
        ),
        "sample": sample,
    }
    n_bytes = sum(leaf.nbytes for leaf in leaves) + upstream.nbytes
    n_flops = 6 * n * top_k * hidden * dim
    found = [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=n_bytes, n_flops=n_flops, **common),
        Problem(upstream=upstream, exact=exact, n_bytes=2 * n_bytes, n_flops=3 * n_flops, **common),
    ]
    if skew:
        return found
    size, label = (n, dim, top_k * hidden), ", dense of the same active size"
    return found + feed_forward.problems(
        "routed_experts", dense_reference.swiglu_mlp, dense.swiglu_mlp, 2, size, device, dtype, label
    )


OP = Op(
    "routed_experts",
    shapes=[
        (16384, 2048, 1536, 64, 6, 0.0),
        (16384, 2048, 1536, 64, 6, 3.0),
        (16384, 2048, 768, 128, 8, 0.0),
        (16384, 2048, 768, 128, 8, 3.0),
    ],
    quick_shapes=[(40, 16, 24, 4, 2, 0.0), (40, 16, 24, 4, 2, 3.0)],
    problems=problems,
)
