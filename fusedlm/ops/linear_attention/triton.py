"""Linear attention with a scalar decay in Triton: one pass forward and one backward over chunks of tokens.

The state stays in registers from chunk to chunk. Saved for backward beside the inputs: the state that enters each
chunk, in the dtype of the inputs. Where sequences and heads are too few for the device, the tokens are split into
segments: a first pass computes what each segment adds to the state, a second adds these up, and then all segments are
computed in parallel.
"""

from dataclasses import dataclass

import torch
import triton

from fusedlm.ops.common.device import n_multiprocessors
from fusedlm.ops.linear_attention import kernels

_SEGMENT_CHUNKS = 8  # a segment has at least so many chunks
_COMBINED_ELEMENTS = 256  # of a state, per program that adds up segments
_STEP_ELEMENTS = 2048  # of a state, per program of the kernel for one token


@dataclass(frozen=True)
class Tiling:
    """How a kernel is launched. columns: of V, per program. resident: programs per multiprocessor; with fewer than half
    of these on the device, the tokens are split into segments."""

    columns: int
    num_warps: int
    stages: int
    resident: int


@dataclass(frozen=True)
class Tilings:
    """For keys of up to key_dim and values of up to value_dim elements; more values: block by block."""

    key_dim: int
    value_dim: int
    chunk: int
    forward: Tiling
    segment: Tiling
    backward: Tiling


TILINGS = {
    torch.bfloat16: [
        Tilings(64, 64, 64, Tiling(64, 4, 2, 4), Tiling(64, 4, 3, 4), Tiling(64, 4, 1, 2)),
        Tilings(64, 128, 64, Tiling(128, 4, 2, 2), Tiling(128, 4, 3, 2), Tiling(64, 4, 1, 2)),
        Tilings(128, 128, 64, Tiling(64, 4, 2, 2), Tiling(64, 4, 2, 2), Tiling(64, 8, 1, 1)),
        Tilings(256, 64, 64, Tiling(64, 8, 1, 1), Tiling(64, 8, 2, 1), Tiling(64, 8, 1, 1)),
    ],
    torch.float32: [
        Tilings(64, 64, 64, Tiling(32, 4, 1, 4), Tiling(32, 4, 1, 4), Tiling(64, 8, 1, 1)),
        Tilings(128, 64, 32, Tiling(32, 4, 1, 4), Tiling(32, 4, 1, 4), Tiling(64, 8, 1, 1)),
        Tilings(256, 32, 16, Tiling(32, 8, 1, 2), Tiling(32, 8, 1, 2), Tiling(32, 8, 1, 1)),
    ],
}


def tilings(dtype: torch.dtype, key_dim: int, value_dim: int) -> Tilings:
    fitting = [row for row in TILINGS[dtype] if key_dim <= row.key_dim]
    return next((row for row in fitting if value_dim <= row.value_dim), fitting[0])


class _Launch:
    """Grid, sizes and constants of a pass over k (B, T, G, K) and v (B, T, H, V)."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, reset: torch.Tensor | None, kernel: str):
        batch, self.n_tokens, self.heads, self.value_dim = v.shape
        self.key_dim, self.ratio, self.reset = k.shape[3], v.shape[2] // k.shape[2], reset
        self.sequences = batch * self.heads
        self.tilings = tilings(v.dtype, self.key_dim, self.value_dim)
        self.chunk = min(self.tilings.chunk, max(16, triton.next_power_of_2(self.n_tokens)))
        self.n_chunks = triton.cdiv(self.n_tokens, self.chunk)
        self.n_blocks = self._constants(kernel)["N_BLOCKS"]
        n_programs = self.sequences * self.n_blocks
        resident = getattr(self.tilings, kernel).resident * n_multiprocessors(v.device)
        n_segments = 1
        if 0 < 2 * n_programs <= resident:
            n_segments = max(1, min(resident // n_programs, self.n_chunks // _SEGMENT_CHUNKS))
        self.per_segment = triton.cdiv(self.n_chunks, n_segments)
        self.n_segments = triton.cdiv(self.n_chunks, self.per_segment)

    def _constants(self, kernel: str) -> dict:
        tiling = getattr(self.tilings, kernel)
        columns = min(tiling.columns, max(16, triton.next_power_of_2(self.value_dim)))
        block_k = max(16, triton.next_power_of_2(self.key_dim))
        fits = self.n_tokens % self.chunk == 0 and self.key_dim == block_k and self.value_dim % columns == 0
        return {
            "K": self.key_dim,
            "V": self.value_dim,
            "N_BLOCKS": triton.cdiv(self.value_dim, columns),
            "C": self.chunk,
            "BK": block_k,
            "BV": columns,
            "RESET": self.reset is not None,
            "FULL": fits,
            "STAGES": tiling.stages,
            "num_warps": tiling.num_warps,
        }

    def _run(self, kernel, name: str, n_segments: int, pointers, strided, **constants) -> None:
        """A kernel whose arguments are pointers, sizes, and strides; the log decay and the resets are the last."""
        log_decay = strided[-1]
        reset_b = 0
        if self.reset is not None and len(self.reset) > 1:
            reset_b = self.reset.stride(0)
        all_constants = self._constants(name) | constants
        strides = [stride for x in strided for stride in x.stride()[:3]]
        kernel[(self.sequences * all_constants["N_BLOCKS"], n_segments)](
            *(log_decay if x is None else x for x in pointers), self.n_tokens, self.n_chunks, self.per_segment,
            self.heads, self.ratio, *strides, reset_b, **all_constants,
        )  # fmt: skip

    def _resets(self) -> torch.Tensor | None:
        return None if self.reset is None else self.reset.view(torch.uint8)

    def forward(self, q, k, v, log_decay, state, out, states, final) -> None:
        """Writes out, final and, unless it is None, states."""
        start = self._passing(k, v, log_decay, state, reverse=False)
        pointers = (q, k, v, log_decay, self._resets(), start, out, states, final)
        options = {"START": start is not None, "SAVE": states is not None}
        self._run(kernels.forward_kernel, "forward", self.n_segments, pointers, (q, k, v, log_decay), **options)

    def backward(self, upstream, d_final, q, k, v, log_decay, states, dq, dk, dv, d_log_decay, d_state) -> None:
        """Writes the gradients, dq and dk (B, T, H, N, K) and d_log_decay (N, B, T, H) per block of V."""
        leaving = self._passing(q, upstream, log_decay, d_final, reverse=True)
        gradients = (dq, dk, dv, d_log_decay, d_state)
        pointers = (upstream, q, k, v, log_decay, self._resets(), states, leaving, *gradients)
        options = {"LEAVING": leaving is not None, "START": d_state is not None}
        strided = (upstream, q, k, v, log_decay)
        self._run(kernels.backward_kernel, "backward", self.n_segments, pointers, strided, **options)

    def _passing(self, x, y, log_decay, outer: torch.Tensor | None, reverse: bool) -> torch.Tensor | None:
        """States (B, H, segments, K, V) that enter the segments, or (reverse) gradients of those that leave them;
        outer: the one (B, H, K, V) at the end of the sequence where this begins; None: zero."""
        if self.n_segments == 1:
            return outer
        size = self.key_dim * self.value_dim
        ends = torch.empty(self.sequences, self.n_segments, size, dtype=torch.float32, device=x.device)
        factors = torch.empty(self.sequences, self.n_segments, dtype=torch.float32, device=x.device)
        pointers = (x, y, log_decay, self._resets(), ends, factors)
        self._run(kernels.segment_kernel, "segment", self.n_segments - 1, pointers, (x, y, log_decay), REVERSE=reverse)
        passing = torch.empty_like(ends)
        kernels.combine_kernel[(self.sequences, triton.cdiv(size, _COMBINED_ELEMENTS))](
            ends, factors, ends if outer is None else outer, passing, self.n_segments, size,
            REVERSE=reverse, OUTER=outer is not None, BLOCK=_COMBINED_ELEMENTS, num_warps=4,
        )  # fmt: skip
        return passing


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the elements of the last dimension are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _empty_states(q: torch.Tensor, v: torch.Tensor, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The last state, float32, and those that enter the chunks, none of them unless they are saved."""
    batch, n_tokens, heads, value_dim = v.shape
    key_dim = q.shape[3]
    n_chunks = -(-n_tokens // tilings(v.dtype, key_dim, value_dim).chunk) if save else 0
    final = torch.empty(batch, heads, key_dim, value_dim, dtype=torch.float32, device=v.device)
    return final, torch.empty(batch, heads, n_chunks, key_dim, value_dim, dtype=v.dtype, device=v.device)


def _step(q, k, v, log_decay, state, reset, out, final) -> None:
    heads, (key_dim, value_dim) = v.shape[2], final.shape[2:]
    block_k = triton.next_power_of_2(key_dim)
    columns = min(triton.next_power_of_2(value_dim), max(16, _STEP_ELEMENTS // block_k))
    n_blocks = triton.cdiv(value_dim, columns)
    strides = [stride for x in (q, k, v, log_decay) for stride in (x.stride(0), x.stride(2))]
    kernels.step_kernel[(len(v) * heads * n_blocks,)](
        q, k, v, log_decay, v if reset is None else reset.view(torch.uint8), v if state is None else state, out, final,
        heads, heads // k.shape[2], *strides, 0 if reset is None or len(reset) == 1 else reset.stride(0),
        K=key_dim, V=value_dim, N_BLOCKS=n_blocks, BK=block_k, BV=columns,
        RESET=reset is not None, START=state is not None, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("fusedlm::decayed_linear_attention_step_", mutates_args=("state",))
def _step_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    reset: torch.Tensor | None,
) -> torch.Tensor:
    """One token; a program reads only the part of the state that it writes."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel():
        _step(_rows(q), _rows(k), _rows(v), log_decay, state, _contiguous(reset), out, state)
    return out


@_step_in_place.register_fake
def _(q, k, v, log_decay, state, reset):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


@torch.library.custom_op("fusedlm::decayed_linear_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, the last state and, to save for backward, those that enter the chunks."""
    q, k, v, state, reset = _rows(q), _rows(k), _rows(v), _contiguous(state), _contiguous(reset)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final, states = _empty_states(q, v, save)
    if v.numel() and v.shape[1] == 1 and not save:
        _step(q, k, v, log_decay, state, reset, out, final)
    elif v.numel():
        _Launch(k, v, reset, "forward").forward(q, k, v, log_decay, state, out, states if save else None, final)
    return out, final, states


@_forward.register_fake
def _(q, k, v, log_decay, state, reset, save):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), *_empty_states(q, v, save)


@torch.library.custom_op("fusedlm::decayed_linear_attention_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    d_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, log_decay and state (empty without one)."""
    upstream, q, k, v, reset = _rows(upstream), _rows(q), _rows(k), _rows(v), _contiguous(reset)
    launch = _Launch(k, v, reset, "backward")
    batch, n_tokens, groups, key_dim = k.shape
    n_blocks, device = launch.n_blocks, v.device
    shape = (batch, n_tokens, launch.heads, n_blocks, key_dim)
    dq, dk = (torch.empty(shape, dtype=q.dtype, device=device) for _ in range(2))
    dv = torch.empty(v.shape, dtype=v.dtype, device=device)
    d_log_decay = torch.empty(n_blocks, *log_decay.shape, dtype=torch.float32, device=device)
    d_state = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=device)
    if v.numel():
        arguments = (upstream, _contiguous(d_final), q, k, v, log_decay, states)
        launch.backward(*arguments, dq, dk, dv, d_log_decay, d_state)
    dq, dk = (_sum_of_parts(x.view(batch, n_tokens, groups, launch.ratio * n_blocks, key_dim), 3) for x in (dq, dk))
    d_log_decay = _sum_of_parts(d_log_decay, 0).to(log_decay.dtype)
    return dq, dk, dv, d_log_decay, v.new_empty(0, dtype=torch.float32) if d_state is None else d_state


def _sum_of_parts(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


@_backward.register_fake
def _(upstream, d_final, q, k, v, log_decay, state, reset, states):
    d_state = v.new_empty(0, dtype=torch.float32) if state is None else torch.empty_like(state).contiguous()
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay)), d_state


def _setup_context(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx, upstream, d_final, _):
    *tensors, states = ctx.saved_tensors
    v = tensors[2]
    if upstream is None:
        upstream = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    dq, dk, dv, d_log_decay, d_state = _backward(upstream, d_final, *tensors, states)
    return dq, dk, dv, d_log_decay, None if tensors[4] is None else d_state, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def decayed_linear_attention(
    q, k, v, log_decay, state, reset, chunk_size=None, in_place=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """chunk_size is that of the reference: the kernels have their own."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    if in_place:
        if v.shape[1] == 1:
            return _step_in_place(q, k, v, log_decay, state, reset), state
        out, after, _ = _forward(q, k, v, log_decay, state, reset, False)
        return out, state.copy_(after)
    state = None if state is None else state.float()
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_decay, state))
    return _forward(q, k, v, log_decay, state, reset, save)[:2]
