"""h_t = (1 - g_t) h_{t-1} + u_t per channel in Triton, forward and backward.

A program computes a block of channels, block of tokens after block of tokens; within a block the recurrence is a scan.
Where sequences and channels are too few for the device, the tokens are split into segments: a first kernel computes the
product of factors and the end from zero of each, and the second finds from these where its segment starts.

The gradient of h is the same recurrence from the last token to the first. Saved for backward: the gates and the states.
"""

import torch
import triton
import triton.language as tl

from fusedlm.ops.common.device import n_multiprocessors

_TOKENS, _CHANNELS = 64, 32  # of a block
_PROGRAMS = 4  # per multiprocessor, as segments allow
_MAX_SEGMENTS = 64  # each program reads the ends of the segments before its own
_UNROLLED = tl.constexpr(8)  # loads of these at a time


@triton.jit
def _compose(first_keep, first_new, keep, new):
    return first_keep * keep, first_new * keep + new


@triton.jit
def _load_block(new, gate, reset, step, column, n_tokens, new_t, gate_t, C, REVERSE: tl.constexpr, RESET: tl.constexpr):
    """Factors and inputs of a block of steps, and their tokens. Steps beyond the last change nothing.

    REVERSE: from the last token to the first, each with the factor of the token after it; the last has the factor 1.
    """
    token, factor_token = step, step
    if REVERSE:
        token = n_tokens - 1 - step
        factor_token = token + 1
    inside = (step < n_tokens)[:, None] & (column < C)[None, :]
    has_factor = inside & (factor_token < n_tokens)[:, None]
    at = token.to(tl.int64)[:, None] * new_t + column[None, :]
    x = tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
    at = factor_token.to(tl.int64)[:, None] * gate_t + column[None, :]
    keep = 1.0 - tl.load(gate + at, mask=has_factor, other=0.0).to(tl.float32)
    if RESET:
        reset_inside = (step < n_tokens) & (factor_token < n_tokens)
        is_reset = tl.load(reset + factor_token, mask=reset_inside, other=0) != 0
        keep = tl.where(is_reset[:, None], 0.0, keep)
    return keep, x, token, inside


@triton.jit
def _ends_kernel(
    new, gate, reset, products, ends, n_tokens, n_blocks, per_segment, C, new_b, new_t, gate_b, gate_t, reset_b,
    BT: tl.constexpr, BC: tl.constexpr, REVERSE: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of channels, segments - 1). products, ends: (B, segments, C)."""
    b, segment = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    new += b * new_b
    gate += b * gate_b
    reset += b * reset_b
    product, end = tl.full((BC,), 1.0, dtype=tl.float32), tl.zeros((BC,), dtype=tl.float32)
    first = segment * per_segment
    for i in range(first, tl.minimum(first + per_segment, n_blocks)):
        step = i * BT + tl.arange(0, BT)
        keep, x, _, _ = _load_block(new, gate, reset, step, column, n_tokens, new_t, gate_t, C, REVERSE, RESET)
        keep, x = tl.associative_scan((keep, x), 0, _compose)
        last = (tl.arange(0, BT) == BT - 1)[:, None]
        keep, x = tl.sum(tl.where(last, keep, 0.0), 0), tl.sum(tl.where(last, x, 0.0), 0)
        product, end = product * keep, end * keep + x
    at = (b * (tl.num_programs(2) + 1) + segment) * C + column
    tl.store(products + at, product, mask=column < C)
    tl.store(ends + at, end, mask=column < C)


@triton.jit
def _start(outer, products, ends, b, segment, n_segments, column, C, OUTER: tl.constexpr):
    """State at the start of a segment."""
    inside = column < C
    state = tl.zeros(column.shape, dtype=tl.float32)
    if OUTER:
        state = tl.load(outer + b * C + column, mask=inside, other=0.0)
    base = b * n_segments * C + column
    for i in range(0, segment, _UNROLLED):
        for j in tl.static_range(_UNROLLED):
            read = inside & (i + j < segment)
            product = tl.load(products + base + (i + j) * C, mask=read, other=1.0)
            state = state * product + tl.load(ends + base + (i + j) * C, mask=read, other=0.0)
    return state


@triton.jit
def _forward_kernel(
    new, gate, reset, outer, products, ends, out, final, n_tokens, n_blocks, per_segment, C,
    new_b, new_t, gate_b, gate_t, reset_b,
    BT: tl.constexpr, BC: tl.constexpr, RESET: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of channels, segments). outer: the first state (B, C), with OUTER."""
    b, segment, n_segments = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    new += b * new_b
    gate += b * gate_b
    reset += b * reset_b
    state = _start(outer, products, ends, b, segment, n_segments, column, C, OUTER)
    first = segment * per_segment
    for i in range(first, tl.minimum(first + per_segment, n_blocks)):
        step = i * BT + tl.arange(0, BT)
        keep, x, token, inside = _load_block(new, gate, reset, step, column, n_tokens, new_t, gate_t, C, False, RESET)
        keep, x = tl.associative_scan((keep, x), 0, _compose)
        x += keep * state[None, :]
        tl.store(out + (b * n_tokens + token)[:, None] * C + column[None, :], x, mask=inside)
        state = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], x, 0.0), 0)
    if segment == n_segments - 1:
        tl.debug_barrier()  # `final` may be `outer` with a single segment, and all warps may have loaded it
        tl.store(final + b * C + column, state, mask=column < C)


@triton.jit
def _backward_kernel(
    upstream, gate, reset, outer, products, ends, states, start, d_gate, d_new, d_start,
    n_tokens, n_blocks, per_segment, C, up_b, up_t, gate_b, gate_t, reset_b,
    BT: tl.constexpr, BC: tl.constexpr, RESET: tl.constexpr, OUTER: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Grid (B, blocks of channels, segments), the first segment being that of the last tokens. outer: the gradient of
    the last state (B, C), with OUTER; start, d_start: the first state and its gradient, with START."""
    b, segment, n_segments = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    upstream += b * up_b
    gate += b * gate_b
    reset += b * reset_b
    gradient = _start(outer, products, ends, b, segment, n_segments, column, C, OUTER)
    first = segment * per_segment
    for i in range(first, tl.minimum(first + per_segment, n_blocks)):
        step = i * BT + tl.arange(0, BT)
        keep, x, token, inside = _load_block(
            upstream, gate, reset, step, column, n_tokens, up_t, gate_t, C, True, RESET
        )
        keep, x = tl.associative_scan((keep, x), 0, _compose)
        x += keep * gradient[None, :]
        at = (b * n_tokens + token)[:, None] * C + column[None, :]
        tl.store(d_new + at, x.to(d_new.dtype.element_ty), mask=inside)
        before = tl.load(states + at - C, mask=inside & (token > 0)[:, None], other=0.0)
        if START:
            first_state = tl.load(start + b * C + column, mask=column < C, other=0.0)
            before = tl.where((token == 0)[:, None], first_state[None, :], before)
        if RESET:
            is_reset = tl.load(reset + token, mask=step < n_tokens, other=0) != 0
            before = tl.where(is_reset[:, None], 0.0, before)
        tl.store(d_gate + at, (-before * x).to(d_gate.dtype.element_ty), mask=inside)
        gradient = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[:, None], x, 0.0), 0)
    if START and segment == n_segments - 1:
        keep = 1.0 - tl.load(gate + column, mask=column < C, other=0.0).to(tl.float32)
        if RESET:
            keep = tl.where(tl.load(reset) != 0, 0.0, keep)
        tl.store(d_start + b * C + column, keep * gradient, mask=column < C)


class _Launch:
    """Grid and sizes of a pass over tensors (B, T, C)."""

    def __init__(self, x: torch.Tensor, reset: torch.Tensor | None):
        self.batch, self.n_tokens, self.channels = x.shape
        self.reset = None if reset is None else reset.view(torch.uint8)
        self.reset_b = 0 if reset is None or len(reset) == 1 else reset.stride(0)
        self.tokens = min(_TOKENS, triton.next_power_of_2(self.n_tokens))
        self.columns = min(_CHANNELS, triton.next_power_of_2(self.channels))
        self.n_blocks = triton.cdiv(self.n_tokens, self.tokens)
        n_programs = self.batch * triton.cdiv(self.channels, self.columns)
        wanted = _PROGRAMS * n_multiprocessors(x.device) // max(1, n_programs)
        self.per_segment = triton.cdiv(self.n_blocks, max(1, min(wanted, _MAX_SEGMENTS, self.n_blocks)))
        self.n_segments = triton.cdiv(self.n_blocks, self.per_segment)

    def run(self, kernel, pointers, x, gate, n_segments, **constants) -> None:
        sizes = (self.n_tokens, self.n_blocks, self.per_segment, self.channels)
        kernel[(self.batch, triton.cdiv(self.channels, self.columns), n_segments)](
            *(x if pointer is None else pointer for pointer in pointers), *sizes, *x.stride()[:2], *gate.stride()[:2],
            self.reset_b, BT=self.tokens, BC=self.columns, RESET=self.reset is not None, num_warps=4, **constants,
        )  # fmt: skip

    def segments(self, x, gate, reverse: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Products of factors and ends of all segments but the last, (B, segments, C); None for one segment."""
        if self.n_segments == 1:
            return None, None
        products, ends = torch.empty(
            2, self.batch, self.n_segments, self.channels, dtype=torch.float32, device=x.device
        )
        pointers = (x, gate, self.reset, products, ends)
        self.run(_ends_kernel, pointers, x, gate, self.n_segments - 1, REVERSE=reverse)
        return products, ends


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the elements of the last dimension are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("fusedlm::gated_scan", mutates_args=())
def _forward(
    gate: torch.Tensor, new: torch.Tensor, state: torch.Tensor | None, reset: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All states and the last one, float32."""
    final = torch.empty(new.shape[0], new.shape[2], dtype=torch.float32, device=new.device)
    return _run(gate, new, _contiguous(state), reset, final), final


def _run(gate, new, state, reset, final) -> torch.Tensor:
    """All states. final: where the last one is written, for one token perhaps the state itself."""
    gate, new, reset = _rows(gate), _rows(new), _contiguous(reset)
    out = torch.empty(new.shape, dtype=torch.float32, device=new.device)
    if new.numel():
        launch = _Launch(new, reset)
        products, ends = launch.segments(new, gate, reverse=False)
        pointers = (new, gate, launch.reset, state, products, ends, out, final)
        launch.run(_forward_kernel, pointers, new, gate, launch.n_segments, OUTER=state is not None)
    return out


@_forward.register_fake
def _(gate, new, state, reset):
    out = torch.empty(new.shape, dtype=torch.float32, device=new.device)
    return out, torch.empty(new.shape[0], new.shape[2], dtype=torch.float32, device=new.device)


@torch.library.custom_op("fusedlm::gated_scan_step_", mutates_args=("state",))
def _step_in_place(
    gate: torch.Tensor, new: torch.Tensor, state: torch.Tensor, reset: torch.Tensor | None
) -> torch.Tensor:
    return _run(gate, new, state, reset, state)


@_step_in_place.register_fake
def _(gate, new, state, reset):
    return torch.empty(new.shape, dtype=torch.float32, device=new.device)


@torch.library.custom_op("fusedlm::gated_scan_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    d_final: torch.Tensor | None,
    gate: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
    states: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate, new (in dtype) and state (empty without one)."""
    upstream, gate, states = _rows(upstream), _rows(gate), states.contiguous()
    d_final, state, reset = _contiguous(d_final), _contiguous(state), _contiguous(reset)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_new = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    d_state = torch.empty(0 if state is None else state.shape, dtype=torch.float32, device=gate.device)
    if gate.numel():
        launch = _Launch(upstream, reset)
        products, ends = launch.segments(upstream, gate, reverse=True)
        pointers = (upstream, gate, launch.reset, d_final, products, ends, states, state, d_gate, d_new, d_state)
        options = {"OUTER": d_final is not None, "START": state is not None}
        launch.run(_backward_kernel, pointers, upstream, gate, launch.n_segments, **options)
    return d_gate, d_new, d_state


@_backward.register_fake
def _(upstream, d_final, gate, state, reset, states, dtype):
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_new = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    return d_gate, d_new, torch.empty(0 if state is None else state.shape, dtype=torch.float32, device=gate.device)


def _setup_context(ctx, inputs, output):
    gate, new, state, reset = inputs
    ctx.dtype = new.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate, state, reset, output[0])


def _gradients(ctx, upstream, d_final):
    gate, state, reset, states = ctx.saved_tensors
    if upstream is None:
        upstream = torch.zeros(states.shape, dtype=states.dtype, device=states.device)
    d_gate, d_new, d_state = _backward(upstream, d_final, gate, state, reset, states, ctx.dtype)
    return d_gate, d_new, None if state is None else d_state, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def gated_scan(gate, new, state, reset, in_place=False) -> tuple[torch.Tensor, torch.Tensor]:
    if in_place and new.shape[1] == 1:
        return _step_in_place(gate, new, state, reset), state
    if in_place:
        out, after = _forward(gate, new, state, reset)
        return out, state.copy_(after)
    return _forward(gate, new, None if state is None else state.float(), reset)
