"""The gated delta rule in Triton: launches and operators. Saved for backward are q, k, the running sums of log decays,
beta, and of each chunk the inverse, the decayed scores, the state that enters it and the values less what it recalls.
"""

import torch
import triton

from fusedlm.ops.common.device import n_multiprocessors
from fusedlm.ops.delta_rule import backward_kernels, forward_kernels
from fusedlm.ops.delta_rule.chunks import CHUNK

_VALUE_BLOCK = 64  # columns of the values that a program of the passes in order takes
_KEY_BLOCK = 64  # columns of the keys that are loaded at a time where all chunks are computed in parallel
_WIDEST_CUT = 128  # key width up to which sequences are cut into segments
_MIN_CHUNKS = 8  # of a segment
_PREPARE = {"num_warps": 4}
_FORWARD = {"STAGES": 2, "num_warps": 4}
_BACKWARD = {"STAGES": 2, "num_warps": 4}
_GRADIENTS = {"STAGES": 2, "num_warps": 4, "num_stages": 1}
_BUSY = 0.75  # programs of a pass in order, per multiprocessor, from which sequences are not cut


class _Shape:
    """Sizes of a call and what the launches have in common."""

    def __init__(self, q, k, v, reset):
        self.batch, self.tokens, groups, self.keys = q.shape
        self.heads, self.values = v.shape[2:]
        self.chunks = triton.cdiv(self.tokens, CHUNK)
        self.rows = self.batch * self.heads
        self.block_k = max(16, triton.next_power_of_2(self.keys))
        self.block_v = min(_VALUE_BLOCK, max(16, triton.next_power_of_2(self.values)))
        self.all_v = max(16, triton.next_power_of_2(self.values))
        self.value_blocks = triton.cdiv(self.values, self.block_v)
        # Of float32 operands, which those of inverses and combined segments always are; tf32x3 is nearly float32.
        self.precision = "tf32x3" if v.dtype == torch.float32 else "tf32"
        self.dtype, self.device = v.dtype, v.device
        self.common = {"H": self.heads, "GROUP": self.heads // groups, "K": self.keys, "RESETS": reset is not None}
        self.reset_stride = 0 if reset is None or len(reset) == 1 else reset.stride(0)
        self.segments = self._n_segments()
        self.per_segment = triton.cdiv(self.chunks, self.segments) if self.chunks else 0

    def _n_segments(self) -> int:
        programs, wanted = self.rows * self.value_blocks, n_multiprocessors(self.device)
        if programs >= _BUSY * wanted or self.keys > _WIDEST_CUT or not programs:
            return 1
        n = min(triton.cdiv(wanted, programs), self.chunks // _MIN_CHUNKS)
        return triton.cdiv(self.chunks, triton.cdiv(self.chunks, n)) if n > 1 else 1

    def empty(self, *size, dtype=torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)


def _as_bytes(reset: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like if reset is None else reset.contiguous().view(torch.uint8)  # never read without resets


def _rows_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views whose last dimension is contiguous; others are copied."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _empty_saved(q, v, save: bool = True) -> tuple[torch.Tensor, ...]:
    """What is computed for later passes: G and beta (B, H, N C) float32, T and M (B, H, N, C, C), M empty up to keys of
    64, and with `save` the states (B, H, N, V, K) and W (B, T, H, V), else empty."""
    batch, tokens, heads, values = v.shape
    keys, chunks = q.shape[3], triton.cdiv(tokens, CHUNK)
    g, strength = (v.new_empty(batch, heads, chunks * CHUNK, dtype=torch.float32) for _ in range(2))
    inverse = v.new_empty(batch, heads, chunks, CHUNK, CHUNK)
    scores = v.new_empty(inverse.shape if keys > 64 else 0)
    states = v.new_empty((batch, heads, chunks, values, keys) if save else 0)
    return g, strength, inverse, scores, states, v.new_empty(v.shape if save else 0)


def _prepare(shape: _Shape, q, k, log_decay, beta, reset, g, strength, inverse, scores) -> None:
    forward_kernels.prepare_kernel[(shape.chunks, shape.rows)](
        q, k, log_decay, beta, _as_bytes(reset, g), g, strength, inverse, scores, shape.tokens, shape.chunks,
        *q.stride()[:3], *k.stride()[:3], *log_decay.stride(), *beta.stride(), shape.reset_stride,
        BK=min(_KEY_BLOCK, shape.block_k), PRECISION=shape.precision, C=CHUNK,
        **_PREPARE, **shape.common,
    )  # fmt: skip


def _combine(shape: _Shape, first, ends, reverse: bool) -> torch.Tensor:
    start = shape.empty(shape.batch, shape.heads, shape.segments, shape.values, shape.keys)
    forward_kernels.combine_kernel[(shape.value_blocks, shape.rows)](
        ends if first is None else first, ends, start, shape.segments,
        K=shape.keys, V=shape.values, BK=shape.block_k, BV=shape.block_v, FIRST=first is not None, REVERSED=reverse,
        PRECISION=shape.precision, num_warps=4, num_stages=1,
    )  # fmt: skip
    return start


def _prepare_blocks(shape: _Shape) -> int:
    return shape.value_blocks + triton.cdiv(shape.keys, shape.block_v)


def _run(q, k, v, log_decay, beta, state, reset, save: bool) -> tuple[torch.Tensor, ...]:
    """out, the last state, and what is saved for backward."""
    shape = _Shape(q, k, v, reset)
    q, k, v = _rows_first(q, k, v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    saved = g, strength, inverse, scores, states, differences = _empty_saved(q, v, save)
    if not out.numel():
        end = shape.empty(shape.batch, shape.heads, shape.keys, shape.values)
        end.zero_() if state is None else end.copy_(state)
        return out, end, *saved
    _prepare(shape, q, k, log_decay, beta, reset, g, strength, inverse, scores)
    start = None if state is None else state.contiguous()

    def launch(blocks, start, begins, end, prepare):
        forward_kernels.forward_kernel[(blocks, shape.segments - prepare, shape.rows)](
            q, k, v, g, strength, inverse, scores, _as_bytes(reset, g), end if start is None else start, out, states,
            differences, end, shape.tokens, shape.chunks, shape.segments, shape.per_segment,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], shape.reset_stride, *out.stride()[:3],
            V=shape.values, BK=shape.block_k, BV=shape.block_v, PREPARE=prepare, START=begins, SAVE=save,
            PRECISION=shape.precision, C=CHUNK, **_FORWARD, **shape.common,
        )  # fmt: skip

    begins = "none" if state is None else "state"
    if shape.segments > 1:
        ends = shape.empty(shape.batch, shape.heads, shape.segments, shape.values + shape.keys, shape.keys)
        launch(_prepare_blocks(shape), start, begins, ends, True)
        start, begins = _combine(shape, start, ends, False), "segments"
    end = shape.empty(shape.batch, shape.heads, shape.keys, shape.values)
    launch(shape.value_blocks, start, begins, end, False)
    return out, end, *saved


@torch.library.custom_op("fusedlm::gated_delta_rule", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    return _run(q, k, v, log_decay, beta, state, reset, True)


def _fake_results(q, v) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, values = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return out, v.new_empty(batch, heads, q.shape[3], values, dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, log_decay, beta, state, reset):
    return *_fake_results(q, v), *_empty_saved(q, v)


@torch.library.custom_op("fusedlm::gated_delta_rule_inference", mutates_args=())
def _inference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    reset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.shape[1] == 1:
        after = v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
        return _step(q, k, v, log_decay, beta, state, reset, after), after
    return _run(q, k, v, log_decay, beta, state, reset, False)[:2]


@_inference.register_fake
def _(q, k, v, log_decay, beta, state, reset):
    return _fake_results(q, v)


@torch.library.custom_op("fusedlm::gated_delta_rule_step_", mutates_args=("state",))
def _step_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    reset: torch.Tensor | None,
) -> torch.Tensor:
    return _step(q, k, v, log_decay, beta, state, reset, state)


@_step_in_place.register_fake
def _(q, k, v, log_decay, beta, state, reset):
    return _fake_results(q, v)[0]


def _step(q, k, v, log_decay, beta, state, reset, after) -> torch.Tensor:
    """The output of one token. after: where the state after it is written, perhaps the state itself: a program reads
    only the part that it writes."""
    shape = _Shape(q, k, v, reset)
    q, k, v = _rows_first(q, k, v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel():
        block_v = min(32, triton.next_power_of_2(shape.values))
        forward_kernels.step_kernel[(triton.cdiv(shape.values, block_v), shape.rows)](
            q, k, v, log_decay, beta, _as_bytes(reset, v), v if state is None else state.contiguous(), out, after,
            q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
            log_decay.stride(0), log_decay.stride(2), beta.stride(0), beta.stride(2), shape.reset_stride,
            V=shape.values, BK=triton.next_power_of_2(shape.keys), BV=block_v, STATE=state is not None, num_warps=4,
            **shape.common,
        )  # fmt: skip
    return out


@torch.library.custom_op("fusedlm::gated_delta_rule_backward", mutates_args=())
def _backward(
    d_out: torch.Tensor,
    d_end: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    strength: torch.Tensor,
    inverse: torch.Tensor,
    scores: torch.Tensor,
    states: torch.Tensor,
    differences: torch.Tensor,
    reset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, the log decays and beta (B, T, H) float32, and the state (B, H, K, V) float32."""
    shape = _Shape(q, k, differences, reset)
    q, k, d_out = _rows_first(q, k, d_out)
    dv = torch.empty_like(differences)
    d_decay, d_beta = (shape.empty(shape.batch, shape.tokens, shape.heads) for _ in range(2))
    d_state = shape.empty(shape.batch, shape.heads, shape.keys, shape.values)
    dq, dk = (torch.empty(*q.shape[:2], shape.heads, shape.keys, dtype=q.dtype, device=q.device) for _ in range(2))
    if not dv.numel() or not q.numel():
        for x in (dq, dk, dv, d_decay, d_beta):
            x.zero_()
        d_state.zero_() if d_end is None else d_state.copy_(d_end)
        return _per_group(dq, q), _per_group(dk, k), dv, d_decay, d_beta, d_state
    d_states = torch.empty_like(states)
    reset_bytes = _as_bytes(reset, g)

    def launch(blocks, leaves, ends, d_start, prepare):
        backward_kernels.backward_state_kernel[(blocks, shape.segments - prepare, shape.rows)](
            q, k, g, strength, inverse, scores, reset_bytes, d_out, d_start if leaves is None else leaves, d_states, dv,
            d_start,
            shape.tokens, shape.chunks, shape.segments, shape.per_segment,
            *q.stride()[:3], *k.stride()[:3], shape.reset_stride, *d_out.stride()[:3],
            V=shape.values, BK=shape.block_k, BV=shape.block_v, PREPARE=prepare, END=ends,
            PRECISION=shape.precision, C=CHUNK, **_BACKWARD, **shape.common,
        )  # fmt: skip

    leaves, ends = (None, "none") if d_end is None else (d_end.contiguous(), "state")
    if shape.segments > 1:
        local = shape.empty(shape.batch, shape.heads, shape.segments, shape.values + shape.keys, shape.keys)
        launch(_prepare_blocks(shape), leaves, ends, local, True)
        leaves, ends = _combine(shape, leaves, local, True), "segments"
    launch(shape.value_blocks, leaves, ends, d_state, False)
    block_k, block_v = min(_KEY_BLOCK, shape.block_k), min(_VALUE_BLOCK, shape.all_v)
    if shape.all_v > block_k:
        block_k = _KEY_BLOCK  # on Triton 3.6 narrower products in a loop read a wrong address
    updates = torch.empty_like(dv) if block_v < shape.all_v else dv
    backward_kernels.gradients_kernel[(shape.chunks, shape.rows)](
        q, k, g, strength, inverse, reset_bytes, states, differences, updates, d_out, d_states, dq, dk, dv, d_decay,
        d_beta, shape.tokens, shape.chunks, triton.cdiv(shape.keys, block_k), triton.cdiv(shape.values, block_v),
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), shape.reset_stride, d_out.stride(0), d_out.stride(2),
        q.stride(1), k.stride(1), d_out.stride(1),
        V=shape.values, BK=block_k, ALL_V=shape.all_v, BV=block_v, PRECISION=shape.precision,
        C=CHUNK, **_GRADIENTS, **shape.common,
    )  # fmt: skip
    return _per_group(dq, q), _per_group(dk, k), dv, d_decay, d_beta, d_state


def _per_group(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum over the value heads that share a key head."""
    if gradient.shape[2] == like.shape[2]:
        return gradient
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3)


@_backward.register_fake
def _(d_out, d_end, q, k, g, strength, inverse, scores, states, differences, reset):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, differences))
    batch, tokens, heads, values = differences.shape
    d_decay, d_beta = (differences.new_empty(batch, tokens, heads, dtype=torch.float32) for _ in range(2))
    return dq, dk, dv, d_decay, d_beta, differences.new_empty(batch, heads, q.shape[3], values, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, k, v, log_decay, beta, state, reset = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = log_decay.dtype, beta.dtype, None if state is None else state.dtype
    ctx.save_for_backward(q, k, reset, *output[2:])


def _gradients(ctx, d_out, d_end, *_):
    q, k, reset, *saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[5])
    dq, dk, dv, d_decay, d_beta, d_state = _backward(d_out, d_end, q, k, *saved, reset)
    decay_dtype, beta_dtype, state_dtype = ctx.dtypes
    d_state = None if state_dtype is None else d_state.to(state_dtype)
    return dq, dk, dv, d_decay.to(decay_dtype), d_beta.to(beta_dtype), d_state, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def gated_delta_rule(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT, chunk_size, in_place=False
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = q_BTGK.to(v_BTHV.dtype), k_BTGK.to(v_BTHV.dtype)
    if in_place:
        if q.shape[1] == 1:
            return _step_in_place(q, k, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT), state_BHKV
        out, after = _inference(q, k, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT)
        return out, state_BHKV.copy_(after)
    leaves = (q, k, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    run = _forward if training else _inference
    return run(q, k, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT)[:2]
