"""Differential linear attention in Triton: two passes forward and three backward, over chunks of tokens.

Forward: states of each stream from chunk to chunk, in registers, each stored in the dtype of the inputs; then all
chunks in parallel, each from its state, both streams of a head in one program that also normalises their difference.
Backward: that of the norm, which gives what both streams receive per token; the gradients of the states, from the last
chunk to the first; then all chunks of a stream in parallel. A program that computes everything of a chunk and carries
states as well needs more registers than there are.

Saved for backward beside the inputs: the outputs before the norm, the second stream, the inverse normalisers, and the
states that enter the chunks. Where there are too few sequences and heads for the device, the passes from chunk to chunk
split the tokens into segments as in ../linear_attention/triton.py.
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
_NORM_ROWS, _NORM_TILES, _NORM_STAGES = 64, 8, 3  # of the norm's backward: tokens per tile, tiles per program


@dataclass(frozen=True)
class Tiling:
    """How a kernel is launched. resident: programs per multiprocessor that `registers` per thread (None: as many as it
    wants) allow; where a pass from chunk to chunk has fewer than half of these, the tokens are split into segments."""

    num_warps: int
    stages: int
    resident: int
    registers: int | None = None

    def options(self) -> dict:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps} | limit


@dataclass(frozen=True)
class Tilings:
    chunk: int
    states: Tiling
    outputs: Tiling
    state_gradients: Tiling
    backward: Tiling


TILINGS = {
    torch.bfloat16: Tilings(64, Tiling(4, 1, 4, 128), Tiling(4, 1, 3, 168), Tiling(4, 1, 4, 128), Tiling(4, 1, 3, 168)),
    torch.float32: Tilings(32, Tiling(4, 1, 2), Tiling(4, 1, 2), Tiling(4, 1, 2), Tiling(8, 1, 1)),
}


class _Launch:
    """Grids, sizes and constants of passes over k (B, T, 2 H, D), k_rope (B, T, 2, R) and v (B, T, H, V)."""

    def __init__(self, k, k_rope, v, log_decay, cos, reset, written):
        self.batch, self.n_tokens, self.heads, self.value_dim = v.shape
        self.head_dim, self.rope_dim = k.shape[3], k_rope.shape[3]
        self.reset, self.written = (None if x is None else x.view(torch.uint8) for x in (reset, written))
        self.table_b = 0 if cos is None or len(cos) == 1 else cos.stride(0)
        self.reset_b = 0 if reset is None or len(reset) == 1 else reset.stride(0)
        self.tilings = TILINGS[v.dtype]
        self.chunk = min(self.tilings.chunk, max(16, triton.next_power_of_2(self.n_tokens)))
        self.n_chunks = triton.cdiv(self.n_tokens, self.chunk)
        self.n_streams = 2 * self.batch * self.heads
        self.decays, self.documents = self._decays(log_decay)

    def _decays(self, log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = log_decay.device
        decays = torch.empty(self.batch, self.heads, self.n_chunks, self.chunk, dtype=torch.float32, device=device)
        documents = None
        if self.reset is not None:
            documents = torch.empty(self.batch, self.n_chunks, self.chunk, dtype=torch.int32, device=device)
        kernels.decays_kernel[(self.batch, self.n_chunks)](
            log_decay, decays if self.reset is None else self.reset, decays, decays if documents is None else documents,
            self.n_tokens, self.n_chunks, self.heads, *log_decay.stride(), self.reset_b,
            C=self.chunk, BH=triton.next_power_of_2(self.heads), RESET=self.reset is not None, num_warps=4,
        )  # fmt: skip
        return decays, documents

    def run(self, kernel, name: str, grid, pointers, scalars, strides, **constants) -> None:
        """A kernel whose arguments are pointers, sizes, scalars and strides. Pointers that are None are not read."""
        tiling = getattr(self.tilings, name)
        if "STAGES" in kernel.arg_names:
            constants["STAGES"] = tiling.stages
        kernel[grid](
            *(self.decays if x is None else x for x in pointers), self.n_tokens, self.n_chunks, *scalars, *strides,
            RESET=self.reset is not None, **self._widths(), **constants, **tiling.options(),
        )  # fmt: skip

    def _widths(self) -> dict:
        sizes = {"D": self.head_dim, "R": self.rope_dim, "V": self.value_dim, "C": self.chunk}
        blocks = {"B" + name: max(16, triton.next_power_of_2(sizes[name])) for name in "DRV"}
        fits = all(sizes[name] in (0, blocks["B" + name]) for name in "DRV")
        return sizes | blocks | {"FULL": fits and self.n_tokens % self.chunk == 0}

    def empty_states(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One per chunk: states and totals, the sums of features."""
        return _empty_states(self.batch, self.heads, self.n_chunks, self.head_dim + self.rope_dim, like)

    def over_chunks(self, kernel, name: str, pointers, outer, saved, last, scalars, strides, *, reverse, **options):
        """A pass from chunk to chunk; outer: the state, or gradient of a state, before its first one; None: 0."""
        segments = self._segments(name)
        per_segment = triton.cdiv(self.n_chunks, segments)
        segments = triton.cdiv(self.n_chunks, per_segment)
        scalars, enters = (per_segment, self.heads, *scalars), "LEAVING" if reverse else "START"
        options = {"START": last is not None} | options
        if segments > 1:
            size = (self.rope_dim + self.head_dim) * (self.value_dim + 1)
            ends = torch.empty(self.n_streams, segments, size, dtype=torch.float32, device=self.decays.device)
            factors = torch.empty(self.n_streams, segments, dtype=torch.float32, device=self.decays.device)
            without = options | {enters: False}
            unused = (None, None, None, None)
            order = (*pointers, *unused, ends, factors)
            self.run(kernel, name, (self.n_streams, segments - 1), order, scalars, strides, ENDS=True, **without)
            passing = torch.empty_like(ends)
            combine_kernel[(self.n_streams, triton.cdiv(size, _COMBINED_ELEMENTS))](
                ends, factors, ends if outer is None else outer, passing, segments, size,
                REVERSE=reverse, OUTER=outer is not None, BLOCK=_COMBINED_ELEMENTS, num_warps=4,
            )  # fmt: skip
            outer = passing
        options[enters] = outer is not None
        order = (*pointers, outer, *saved, last, None, None)
        self.run(kernel, name, (self.n_streams, segments), order, scalars, strides, ENDS=False, **options)

    def _segments(self, name: str) -> int:
        resident = getattr(self.tilings, name).resident * n_multiprocessors(self.decays.device)
        if not 0 < 2 * self.n_streams <= resident:
            return 1
        return max(1, min(resident // self.n_streams, self.n_chunks // _SEGMENT_CHUNKS))


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the elements of the last dimension are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _state_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    return q.shape[0], q.shape[2], q.shape[3], v.shape[3] + 1


def _empty_states(batch, heads, n_chunks, key_dim, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = (batch, 2, heads, n_chunks, key_dim)
    states = torch.empty(*size, like.shape[3], dtype=like.dtype, device=like.device)
    return states, torch.empty(size, dtype=torch.float32, device=like.device)


def _saved(q: torch.Tensor, v: torch.Tensor, save: bool) -> tuple[torch.Tensor, ...]:
    """Difference and noise (B, T, H, V), inverse normalisers (B, 2, H, T), states (B, 2, H, n_chunks, R + D, V) and
    totals (B, 2, H, n_chunks, R + D) of features; empty unless they are saved."""
    if not save:
        return tuple(torch.empty(0, dtype=dtype, device=v.device) for dtype in _saved_dtypes(v))
    batch, n_tokens, heads, _ = v.shape
    outputs = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    inverses = torch.empty(batch, 2, heads, n_tokens, dtype=torch.float32, device=v.device)
    n_chunks = -(-n_tokens // TILINGS[v.dtype].chunk)
    return *outputs, inverses, *_empty_states(batch, heads, n_chunks, q.shape[3], v)


def _saved_dtypes(v: torch.Tensor) -> tuple[torch.dtype, ...]:
    return v.dtype, v.dtype, torch.float32, v.dtype, torch.float32


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


@torch.library.custom_op("fusedlm::differential_linear_attention_step_", mutates_args=("state",))
def _step_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    k_rope: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor,
    reset: torch.Tensor | None,
    written: torch.Tensor | None,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """One token; a program reads only the part of the state that it writes."""
    q, k, k_rope, v = _rows(q), _rows(k), _rows(k_rope), _rows(v)
    cos, sin, weight, gamma, reset, written = map(_contiguous, (cos, sin, weight, gamma, reset, written))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel():
        _step(q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written, scale, eps, out, state)
    return out


@_step_in_place.register_fake
def _(q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written, scale, eps):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


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
    launch = _Launch(k, k_rope, v, log_decay, cos, reset, written)
    difference, noise, inverses, *chunk_states = saved if save else (None, None, None, *launch.empty_states(v))
    tables, options = (launch.decays, launch.documents), {"WRITTEN": written is not None}
    launch.over_chunks(
        kernels.states_kernel, "states", (k, k_rope, v, *tables, launch.written), state, chunk_states, final, (scale,),
        _strides(k, k_rope, v), reverse=False, **options,
    )  # fmt: skip
    pointers = (q, k, k_rope, v, *tables, cos, sin, weight, gamma, launch.written, *chunk_states)
    launch.run(
        kernels.outputs_kernel, "outputs", (launch.batch * launch.n_chunks * launch.heads,),
        (*pointers, out, difference, noise, inverses), (launch.heads, scale, eps),
        (*_strides(q, k, k_rope, v), launch.table_b), SAVE=save, **options,
    )  # fmt: skip
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
    dq, dk = (torch.empty(x.shape, dtype=v.dtype, device=device) for x in (q, k))
    dk_rope = torch.empty(batch, n_tokens, 2, heads, rope_dim, dtype=v.dtype, device=device)
    dv = torch.empty(2, *v.shape, dtype=v.dtype, device=device)  # per stream, as d_log_decay
    d_log_decay = torch.empty(2, *log_decay.shape, dtype=torch.float32, device=device)
    d_state = torch.empty(0 if state is None else state.shape, dtype=torch.float32, device=device)
    if v.numel():
        launch = _Launch(k, k_rope, v, log_decay, cos, reset, written)
        dy = torch.empty(v.shape, dtype=v.dtype, device=device)
        deltas = torch.empty(inverses.shape, dtype=torch.float32, device=device)
        d_weight, d_gamma = _norm_gradients(upstream, difference, noise, weight, gamma, dy, deltas, eps)
        tables, per_token = (launch.decays, launch.documents, cos, sin, weight), (deltas, inverses)
        d_chunk_states = launch.empty_states(v)
        launch.over_chunks(
            gradient_kernels.state_gradients_kernel, "state_gradients", (dy, q, *tables, *per_token), d_final,
            d_chunk_states, None if state is None else d_state, (scale,), (*_strides(q), launch.table_b), reverse=True,
        )  # fmt: skip
        inputs = (dy, q, k, k_rope, v, *tables, launch.reset, launch.written, *per_token, states, totals)
        launch.run(
            gradient_kernels.backward_kernel, "backward", (batch * launch.n_chunks * heads * 2,),
            (*inputs, *d_chunk_states, dq, dk, dk_rope, dv, d_log_decay), (heads, scale),
            (*_strides(q, k, k_rope, v), launch.table_b, launch.reset_b), WRITTEN=written is not None,
        )  # fmt: skip
    else:
        d_weight, d_gamma = weight.new_zeros(weight.shape), gamma.new_zeros(gamma.shape)
    dk_rope = dk_rope.sum(3, dtype=torch.float32).to(k_rope.dtype)
    d_log_decay = (d_log_decay[0] + d_log_decay[1]).to(log_decay.dtype)
    return dq, dk, dk_rope, dv[0] + dv[1], d_log_decay, d_weight, d_gamma, d_state


def _norm_gradients(upstream, difference, noise, weight, gamma, dy, deltas, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes dy and deltas; gradients of weight and gamma."""
    batch, n_tokens, heads, value_dim = dy.shape
    rows = min(_NORM_ROWS, triton.next_power_of_2(n_tokens))
    n_programs = triton.cdiv(n_tokens, rows * _NORM_TILES)
    d_weight = torch.empty(batch * n_programs, heads, dtype=torch.float32, device=dy.device)
    d_gamma = torch.empty(batch * heads * n_programs, value_dim, dtype=torch.float32, device=dy.device)
    block = max(16, triton.next_power_of_2(value_dim))
    gradient_kernels.norm_gradient_kernel[(batch * heads, n_programs)](
        upstream, difference, noise, weight, gamma, dy, deltas, d_weight, d_gamma, n_tokens, _NORM_TILES, heads, eps,
        *upstream.stride()[:3], V=value_dim, BV=block, ROWS=rows,
        FULL=value_dim == block and n_tokens % rows == 0, STAGES=_NORM_STAGES, num_warps=4,
    )  # fmt: skip
    return column_sums_of_two(d_weight, weight.dtype, d_gamma, gamma.dtype)


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
    q, k, k_rope, v, log_decay, weight, gamma, rope, scale, eps, state, reset, written, chunk_size=None,
    in_place=False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """chunk_size is that of the reference: the kernels have their own."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    cos = sin = None
    if rope is not None:
        cos, sin = (x.detach().float() for x in rope)
    k_rope = rotate(k_rope.float(), None if rope is None else (cos, sin))
    if in_place:
        inputs = (q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written, scale, eps)
        if v.shape[1] == 1:
            return _step_in_place(*inputs), state
        out, after = _forward(*inputs, False)[:2]
        return out, state.copy_(after)
    state = None if state is None else state.float()
    leaves = (q, k, k_rope, v, log_decay, weight, gamma, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    inputs = (q, k, k_rope, v, log_decay, cos, sin, weight, gamma, state, reset, written)
    return _forward(*inputs, scale, eps, save)[:2]
