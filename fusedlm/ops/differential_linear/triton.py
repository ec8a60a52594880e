"""Differential linear attention in Triton: one pass forward and two backward, over chunks of tokens.

Both streams are computed by one program, their states in registers from chunk to chunk. Saved for backward beside the
inputs: the outputs before the norm, the second stream, the inverse normalisers, and the states that enter the chunks.
The first pass backward is that of the norm; it gives what both streams receive per token. Tokens are split into
segments as in ../linear_attention/triton.py.
"""

from dataclasses import dataclass

import torch
import triton

from fusedlm.ops.common.device import n_multiprocessors
from fusedlm.ops.common.sums import column_sums_of_two
from fusedlm.ops.differential_linear import gradient_kernels, kernels
from fusedlm.ops.differential_linear.reference import rotate
from fusedlm.ops.linear_attention.kernels import combine_kernel

_SEGMENT_CHUNKS = 8  # a segment has at least so many chunks
_COMBINED_ELEMENTS = 256  # of a state, per program that adds up segments
_NORM_CHUNKS = 8  # chunks per program of the norm's backward


@dataclass(frozen=True)
class Tiling:
    """How a kernel is launched. resident: programs per multiprocessor; with fewer than half of these on the device, the
    tokens are split into segments."""

    num_warps: int
    stages: int
    resident: int


@dataclass(frozen=True)
class Tilings:
    chunk: int
    forward: Tiling
    ends: Tiling
    backward: Tiling


TILINGS = {
    torch.bfloat16: Tilings(64, Tiling(4, 1, 2), Tiling(4, 1, 2), Tiling(4, 1, 2)),
    torch.float32: Tilings(32, Tiling(4, 1, 2), Tiling(4, 1, 2), Tiling(8, 1, 1)),
}


class _Launch:
    """Grid, sizes and constants of a pass over k (B, T, 2 H, D), k_rope (B, T, 2, R) and v (B, T, H, V)."""

    def __init__(self, k, k_rope, v, cos, reset, written, kernel: str):
        self.batch, self.n_tokens, self.heads, self.value_dim = v.shape
        self.head_dim, self.rope_dim = k.shape[3], k_rope.shape[3]
        self.cos, self.reset, self.written = cos, reset, written
        self.tilings = TILINGS[v.dtype]
        self.chunk = min(self.tilings.chunk, max(16, triton.next_power_of_2(self.n_tokens)))
        self.n_chunks = triton.cdiv(self.n_tokens, self.chunk)
        n_programs = self.batch * self.heads
        resident = getattr(self.tilings, kernel).resident * n_multiprocessors(v.device)
        n_segments = 1
        if 0 < 2 * n_programs <= resident:
            n_segments = max(1, min(resident // n_programs, self.n_chunks // _SEGMENT_CHUNKS))
        self.per_segment = triton.cdiv(self.n_chunks, n_segments)
        self.n_segments = triton.cdiv(self.n_chunks, self.per_segment)

    def run(self, kernel, name: str, grid, pointers, strided, scalars, *, table=True, **constants) -> None:
        """A kernel whose arguments are pointers, sizes, scalars, strides, and (table) the batch stride of the rotary
        tables, then that of the resets. Pointers that are None are not read."""
        unused = next(x for x in pointers if x is not None)
        tiling = getattr(self.tilings, name)
        strides = [stride for x in strided for stride in x.stride()[:3]]
        if table:
            strides.append(0 if self.cos is None or len(self.cos) == 1 else self.cos.stride(0))
        strides.append(0 if self.reset is None or len(self.reset) == 1 else self.reset.stride(0))
        kernel[grid](
            *(unused if x is None else x for x in pointers), self.n_tokens, self.n_chunks, self.per_segment, self.heads,
            *scalars, *strides, RESET=self.reset is not None, STAGES=tiling.stages, num_warps=tiling.num_warps,
            **self.widths(), **constants,
        )  # fmt: skip

    def widths(self) -> dict:
        sizes = {"D": self.head_dim, "R": self.rope_dim, "V": self.value_dim, "C": self.chunk}
        blocks = {"B" + name: max(16, triton.next_power_of_2(sizes[name])) for name in "DRV"}
        fits = all(sizes[name] in (0, blocks["B" + name]) for name in "DRV")
        return sizes | blocks | {"FULL": fits and self.n_tokens % self.chunk == 0}

    def masks(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Resets and written tokens, as the kernels read them."""
        return tuple(None if x is None else x.view(torch.uint8) for x in (self.reset, self.written))

    def passing(self, kernel, pointers, strided, scalars, outer, *, reverse: bool, **options) -> torch.Tensor | None:
        """States (B * 2 * H, segments, R + D, V + 1) that enter the segments, or (reverse) gradients of those that
        leave them; outer: the one at the end of the sequence where this begins; None: zero."""
        if self.n_segments == 1:
            return outer
        n_streams = 2 * self.batch * self.heads
        size = (self.rope_dim + self.head_dim) * (self.value_dim + 1)
        device = strided[0].device
        ends = torch.empty(n_streams, self.n_segments, size, dtype=torch.float32, device=device)
        factors = torch.empty(n_streams, self.n_segments, dtype=torch.float32, device=device)
        self.run(
            kernel, "ends", (n_streams, self.n_segments - 1), (*pointers, ends, factors), strided, scalars, **options
        )
        passing = torch.empty_like(ends)
        combine_kernel[(n_streams, triton.cdiv(size, _COMBINED_ELEMENTS))](
            ends, factors, ends if outer is None else outer, passing, self.n_segments, size,
            REVERSE=reverse, OUTER=outer is not None, BLOCK=_COMBINED_ELEMENTS, num_warps=4,
        )  # fmt: skip
        return passing


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the elements of the last dimension are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _state_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    return q.shape[0], q.shape[2], q.shape[3], v.shape[3] + 1


def _saved(q: torch.Tensor, v: torch.Tensor, save: bool) -> tuple[torch.Tensor, ...]:
    """Difference and noise (B, T, H, V), inverse normalisers (B, 2, H, T), states (B, 2, H, n_chunks, R + D, V) and
    totals (B, 2, H, n_chunks, R + D) of features; empty unless they are saved."""
    batch, n_tokens, heads, value_dim = v.shape
    key_dim = q.shape[3]
    n_chunks = -(-n_tokens // TILINGS[v.dtype].chunk)
    shapes = {
        "difference": (v.shape, v.dtype),
        "noise": (v.shape, v.dtype),
        "inverses": ((batch, 2, heads, n_tokens), torch.float32),
        "states": ((batch, 2, heads, n_chunks, key_dim, value_dim), v.dtype),
        "totals": ((batch, 2, heads, n_chunks, key_dim), torch.float32),
    }
    return tuple(torch.empty(shape if save else 0, dtype=dtype, device=v.device) for shape, dtype in shapes.values())


def _step(q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written, scale, eps, out, final) -> None:
    sizes = {"D": k.shape[3], "R": k_rope.shape[3], "V": v.shape[3]}
    blocks = {"B" + name: max(2, triton.next_power_of_2(size)) for name, size in sizes.items()}
    strides = [stride for x in (q, k, k_rope, v, log_decay) for stride in (x.stride(0), x.stride(2))]
    strides += [0 if x is None or len(x) == 1 else x.stride(0) for x in (cos, reset)]
    masks = (None if x is None else x.view(torch.uint8) for x in (reset, written))
    pointers = (q, k, k_rope, v, log_decay, cos, sin, weight, gamma, *masks, state, out, final)
    kernels.step_kernel[(len(v) * v.shape[2],)](
        *(v if x is None else x for x in pointers), v.shape[2], scale, eps, *strides, **sizes, **blocks,
        RESET=reset is not None, WRITTEN=written is not None, START=state is not None, num_warps=8,
    )  # fmt: skip


@torch.library.custom_op("fusedlm::differential_linear_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
    written: torch.Tensor | None,
    scale: float,
    eps: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, the last state, and what is saved for backward."""
    q, k, k_rope, v = _rows(q), _rows(k), _rows(k_rope), _rows(v)
    cos, sin, weight, gamma, state, reset, written = map(_contiguous, (cos, sin, weight, gamma, state, reset, written))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(_state_shape(q, v), dtype=torch.float32, device=v.device)
    saved = _saved(q, v, save)
    if not v.numel():
        return out, final, *saved
    inputs = (q, k, k_rope, v, log_decay)
    if v.shape[1] == 1 and not save:
        _step(*inputs, cos, sin, weight, gamma, state, reset, written, scale, eps, out, final)
        return out, final, *saved
    launch = _Launch(k, k_rope, v, cos, reset, written, "forward")
    masks, options = launch.masks(), {"WRITTEN": written is not None}
    strided = (k, k_rope, v, log_decay)
    start = launch.passing(
        kernels.ends_kernel, (*strided, *masks), strided, (scale,), state, reverse=False, table=False, **options
    )
    pointers = (*inputs, cos, sin, weight, gamma, *masks, start, out, *(saved if save else [None] * 5), final)
    grid = (launch.batch * launch.heads, launch.n_segments)
    options |= {"START": start is not None, "SAVE": save}
    launch.run(kernels.forward_kernel, "forward", grid, pointers, inputs, (scale, eps), **options)
    return out, final, *saved


@_forward.register_fake
def _(q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written, scale, eps, save):
    final = torch.empty(_state_shape(q, v), dtype=torch.float32, device=v.device)
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), final, *_saved(q, v, save)


@torch.library.custom_op("fusedlm::differential_linear_attention_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    d_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
    written: torch.Tensor | None,
    difference: torch.Tensor,
    noise: torch.Tensor,
    inverses: torch.Tensor,
    states: torch.Tensor,
    totals: torch.Tensor,
    scale: float,
    eps: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """Gradients of q, k, k_rope, v, log_decay, weight, gamma and state (empty without one)."""
    upstream, q, k, k_rope, v = map(_rows, (upstream, q, k, k_rope, v))
    cos, sin, weight, gamma, d_final, reset, written = map(
        _contiguous, (cos, sin, weight, gamma, d_final, reset, written)
    )
    batch, n_tokens, heads, value_dim = v.shape
    device, rope_dim = v.device, k_rope.shape[3]
    dq, dk, dv = (torch.empty(x.shape, dtype=v.dtype, device=device) for x in (q, k, v))
    dk_rope = torch.empty(batch, n_tokens, 2, heads, rope_dim, dtype=v.dtype, device=device)
    d_log_decay = torch.empty(log_decay.shape, dtype=torch.float32, device=device)
    d_state = torch.empty(0 if state is None else state.shape, dtype=torch.float32, device=device)
    if not v.numel():
        d_weight, d_gamma = weight.new_zeros(weight.shape), gamma.new_zeros(gamma.shape)
        return dq, dk, dk_rope.sum(3).to(k_rope.dtype), dv, d_log_decay.to(log_decay.dtype), d_weight, d_gamma, d_state
    launch = _Launch(k, k_rope, v, cos, reset, written, "backward")
    dy = torch.empty(v.shape, dtype=v.dtype, device=device)
    deltas = torch.empty(inverses.shape, dtype=torch.float32, device=device)
    n_programs = triton.cdiv(launch.n_chunks, _NORM_CHUNKS)
    d_weight = torch.empty(batch * n_programs, heads, dtype=torch.float32, device=device)
    d_gamma = torch.empty(batch * heads * n_programs, value_dim, dtype=torch.float32, device=device)
    widths = launch.widths()
    gradient_kernels.norm_gradient_kernel[(batch * heads, n_programs)](
        upstream, difference, noise, weight, gamma, dy, deltas, d_weight, d_gamma, n_tokens, _NORM_CHUNKS, heads, eps,
        *upstream.stride()[:3], **{name: widths[name] for name in ("V", "C", "BV", "FULL")}, num_warps=4,
    )  # fmt: skip
    reset_mask, written_mask = launch.masks()
    pointers = (dy, q, log_decay, cos, sin, weight, reset_mask, deltas, inverses)
    leaving = launch.passing(
        gradient_kernels.gradient_ends_kernel, pointers, (q, log_decay), (scale,), d_final, reverse=True
    )
    inputs = (q, k, k_rope, v, log_decay)
    saved = (deltas, inverses, states, totals, leaving)
    gradients = (dq, dk, dk_rope, dv, d_log_decay, None if state is None else d_state)
    pointers = (dy, *inputs, cos, sin, weight, reset_mask, written_mask, *saved, *gradients)
    options = {"WRITTEN": written is not None, "LEAVING": leaving is not None, "START": state is not None}
    grid = (batch * heads, launch.n_segments)
    launch.run(gradient_kernels.backward_kernel, "backward", grid, pointers, inputs, (scale,), **options)
    d_weight, d_gamma = column_sums_of_two(d_weight, weight.dtype, d_gamma, gamma.dtype)
    dk_rope = dk_rope.sum(3, dtype=torch.float32).to(k_rope.dtype)
    return dq, dk, dk_rope, dv, d_log_decay.to(log_decay.dtype), d_weight, d_gamma, d_state


@_backward.register_fake
def _(
    upstream, d_final, q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written,
    difference, noise, inverses, states, totals, scale, eps,
):  # fmt: skip
    tensors = (q, k, k_rope, v, log_decay, weight, gamma)
    d_state = torch.empty(0 if state is None else state.shape, dtype=torch.float32, device=v.device)
    return *(torch.empty(x.shape, dtype=x.dtype, device=v.device) for x in tensors), d_state


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.eps, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _gradients(ctx, upstream, d_final, *_):
    tensors = ctx.saved_tensors
    v, state = tensors[3], tensors[9]
    if upstream is None:
        upstream = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    gradients = _backward(upstream, d_final, *tensors, ctx.scale, ctx.eps)
    d_inputs, d_state = gradients[:5], None if state is None else gradients[7]
    return *d_inputs, None, None, *gradients[5:7], d_state, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def differential_linear_attention(
    q, k, k_rope, v, log_decay, weight, gamma, rope, scale, eps, state, reset, written, chunk_size=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """chunk_size is that of the reference: the kernels have their own."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    cos = sin = None
    if rope is not None:
        cos, sin = (x.detach().float() for x in rope)
    k_rope = rotate(k_rope.float(), None if rope is None else (cos, sin))
    state = None if state is None else state.float()
    leaves = (q, k, k_rope, v, log_decay, weight, gamma, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    inputs = (q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written)
    return _forward(*inputs, scale, eps, save)[:2]
