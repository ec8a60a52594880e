"""Kernels of the short convolution: walkers that go through tokens with the last inputs in registers.

A program is a strip of channels and a few walkers, each of which goes through a span of tokens of one row of the batch,
forward in the forward pass and backward in the backward pass. A tile is (walkers, heads, width of a head): one token of
each walker. Each input is read once, but for the size - 1 tokens before a span and, in the backward pass, after it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fusedlm.ops.common.activations import sigmoid


@triton.jit
def _spans(block, batch, n_tokens, n_spans, span, WALKERS: tl.constexpr):
    """Of each walker of a block, all (W, 1, 1): its row of the batch (int64), its first token, and the number of tokens
    of the row, 0 for walkers beyond the last."""
    walker = (block * WALKERS + tl.arange(0, WALKERS))[:, None, None]
    b = walker // n_spans
    return b.to(tl.int64), walker % n_spans * span, tl.where(b < batch, n_tokens, 0)


@triton.jit
def _part_of(
    strip, tensors, PARTS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of the part that a strip belongs to: its tensor with the elements from one token to the next, and its scale; the
    channels (1, HEADS, BLOCK) of the strip in the part, their offset in the convolution, and which of them exist.
    WIDTH: of a head."""
    tensor = tensors[0]
    first_strip, first, n_channels, pitch, scale = PARTS[0]
    for part in tl.static_range(1, len(PARTS)):
        if strip >= PARTS[part][0]:
            tensor = tensors[part]
            first_strip, first, n_channels, pitch, scale = PARTS[part]
    column = tl.arange(0, BLOCK)[None, None, :]
    channel = ((strip - first_strip) * HEADS + tl.arange(0, HEADS)[None, :, None]) * WIDTH + column
    return tensor, pitch, scale, channel, first, (column < WIDTH) & (channel < n_channels)


@triton.jit
def _is_token(t, n):
    """0 <= t < n."""
    return t.to(tl.uint32) < n.to(tl.uint32)


@triton.jit
def _input(row, tail_end, t, n, inside, SIZE: tl.constexpr, N: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Token t of each walker, of n. row: where it is in x; from the tail where t < 0, which ends before tail_end."""
    now = tl.load(row, mask=_is_token(t, n) & inside, other=0.0)
    if HAS_TAIL:
        before = tl.load(tail_end + t * N, mask=(t < 0) & (t > -SIZE) & (n > 0) & inside, other=0.0)
        now = tl.where(t < 0, before, now)
    return now


@triton.jit
def _position(at, t, n, PACKED: tl.constexpr):
    """In its document, of token t of each walker."""
    if PACKED:
        return tl.load(at, mask=_is_token(t, n), other=0)
    else:
        return 0


@triton.jit
def _convolved(now, past, taps, position, SIZE: tl.constexpr, PACKED: tl.constexpr):
    """The sum over the taps, of which none reads an earlier document."""
    y = taps[0] * now
    for back in tl.static_range(1, SIZE):
        before = past[back - 1]
        if PACKED:
            before = tl.where(position >= back, before, 0.0)
        y += taps[back] * before
    return y


@triton.jit
def _forward_strip(
    x, weight, tail, positions, lengths, parts, after, batch, n_tokens, n_spans, span, x_b, positions_b,
    strip, block,
    SIZE: tl.constexpr, N: tl.constexpr, X_T: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, HAS_TAIL: tl.constexpr, PACKED: tl.constexpr, CARRY: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, WALKERS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b, start, n = _spans(block, batch, n_tokens, n_spans, span, WALKERS)
    y, pitch, scale, channel, first, inside = _part_of(strip, parts, PARTS, WIDTH, HEADS, BLOCK)
    column = first + channel
    row = x + b * x_b + column + start.to(tl.int64) * X_T
    tail_end = tail + (b + 1) * ((SIZE - 1) * N) + column
    out = y + (b * n_tokens + start) * pitch + channel
    position_at = positions + b * positions_b + start
    taps = ()
    past = ()
    for back in tl.static_range(SIZE):
        taps = taps + (tl.load(weight + back * N + column, mask=inside, other=0.0).to(tl.float32),)
        if back > 0:
            before = _input(row - back * X_T, tail_end, start - back, n, inside, SIZE, N, HAS_TAIL)
            past = past + (before.to(tl.float32),)
    for i in range(0, span, ROWS):
        rows = ()
        places = ()
        for u in tl.static_range(ROWS):
            t = start + i + u
            rows = rows + (tl.load(row + u * X_T, mask=(t < n) & inside, other=0.0),)
            places = places + (_position(position_at + i + u, t, n, PACKED),)
        row += ROWS * X_T
        for u in tl.static_range(ROWS):
            t = start + i + u
            now = rows[u].to(tl.float32)
            s = _convolved(now, past, taps, places[u], SIZE, PACKED)
            if SIZE > 1:
                past = (now,) + past[:-1]
            if SILU:
                s *= sigmoid(s)
            if NORM:
                s *= (tl.rsqrt(tl.sum(s * s, 2) + EPS) * scale)[:, :, None]
            tl.store(out, s.to(out.dtype.element_ty), mask=(t < n) & inside)
            out += pitch
    if CARRY:
        for i in tl.static_range(SIZE - 1):
            t = n - (SIZE - 1) + i
            if HAS_LENGTHS:
                t = tl.load(lengths + b, mask=n > 0, other=0).to(tl.int32) - (SIZE - 1) + i
            last = _input(x + b * x_b + column + t.to(tl.int64) * X_T, tail_end, t, n, inside, SIZE, N, HAS_TAIL)
            at = (b * (SIZE - 1) + i) * N + column
            tl.store(after + at, last.to(after.dtype.element_ty), mask=(start == 0) & (n > 0) & inside)


@triton.jit(do_not_specialize=["batch", "n_tokens", "n_spans", "span", "x_b", "positions_b"])
def forward_kernel(
    x, weight, tail, positions, lengths, parts, after, batch, n_tokens, n_spans, span, x_b, positions_b,
    SIZE: tl.constexpr, N: tl.constexpr, X_T: tl.constexpr, SILU: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, N_STRIPS: tl.constexpr, NORM_STRIPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr, HAS_TAIL: tl.constexpr, PACKED: tl.constexpr, CARRY: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    WALKERS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """X_T, x_b: strides of x, that of the batch in units of ALIGN elements. PARTS: of each the first strip, the first
    channel, the number of channels, the elements from one token to the next, and the scale. The first NORM_STRIPS
    strips are heads of HEAD_DIM, which are normalised. CARRY: the next tail is written to `after`."""
    x_b = x_b.to(tl.int64) * ALIGN
    strip, block = tl.program_id(0) % N_STRIPS, tl.program_id(0) // N_STRIPS
    if strip < NORM_STRIPS:
        _forward_strip(
            x, weight, tail, positions, lengths, parts, after, batch, n_tokens, n_spans, span, x_b,
            positions_b, strip, block, SIZE, N, X_T, SILU, True, EPS, PARTS, HEAD_DIM, HAS_TAIL, PACKED,
            CARRY, HAS_LENGTHS, WALKERS, HEADS, BLOCK, ROWS,
        )  # fmt: skip
    else:
        _forward_strip(
            x, weight, tail, positions, lengths, parts, after, batch, n_tokens, n_spans, span, x_b,
            positions_b, strip, block, SIZE, N, X_T, SILU, False, EPS, PARTS, BLOCK, HAS_TAIL, PACKED,
            CARRY, HAS_LENGTHS, WALKERS, HEADS, BLOCK, ROWS,
        )  # fmt: skip


@triton.jit
def _gradient_of_sum(pre, upstream, scale, SILU: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """The gradient of the convolution before the activation."""
    s = pre
    derivative = 1.0
    if SILU:
        gate = sigmoid(pre)
        s = pre * gate
        derivative = gate + s * (1.0 - gate)
    if NORM:
        inverse = tl.rsqrt(tl.sum(s * s, 2) + EPS)
        along = tl.sum(s * upstream, 2) * inverse * inverse
        upstream = (upstream - s * along[:, :, None]) * (inverse * scale)[:, :, None]
    return upstream * derivative


@triton.jit
def _step(
    now, upstream, position, scale, taps, inputs, owed, SIZE: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One token, `now` being the earliest input it uses and `inputs` the others. Returns the gradient of its input, its
    parts of those of the taps, and `inputs` and `owed` of the token before."""
    inputs = inputs + (now.to(tl.float32),)
    pre = _convolved(inputs[0], inputs[1:], taps, position, SIZE, PACKED)
    d_pre = _gradient_of_sum(pre, upstream.to(tl.float32), scale, SILU, NORM, EPS)
    d_now = taps[0] * d_pre
    if SIZE > 1:
        d_now += owed[0]
    d_taps = (d_pre * inputs[0],)
    earlier = ()
    for back in tl.static_range(1, SIZE):
        d_back = d_pre
        if PACKED:
            d_back = tl.where(position >= back, d_pre, 0.0)
        d_taps = d_taps + (d_back * inputs[back],)
        d_input = taps[back] * d_back
        if back < SIZE - 1:
            d_input += owed[back]
        earlier = earlier + (d_input,)
    return d_now, d_taps, inputs[1:], earlier


@triton.jit
def _backward_strip(
    x, weight, tail, positions, upstreams, dx, d_tail, d_weight, batch, n_tokens, n_spans, span, x_b, positions_b,
    strip, block,
    SIZE: tl.constexpr, N: tl.constexpr, X_T: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, HAS_TAIL: tl.constexpr, PACKED: tl.constexpr, WALKERS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    b, start, n = _spans(block, batch, n_tokens, n_spans, span, WALKERS)
    dy, pitch, scale, channel, first, inside = _part_of(strip, upstreams, PARTS, WIDTH, HEADS, BLOCK)
    column = first + channel
    zeros = tl.zeros((WALKERS, HEADS, BLOCK), dtype=tl.float32)
    last = start + span - 1
    row = x + b * x_b + column + (last.to(tl.int64) - (SIZE - 1)) * X_T
    tail_end = tail + (b + 1) * ((SIZE - 1) * N) + column
    up = dy + (b * n_tokens + last) * pitch + channel
    out = dx + (b * n_tokens + last) * N + column
    position_at = positions + b * positions_b + last
    taps = ()
    sums = ()  # gradients of the taps
    owed = ()  # gradients of the inputs before a token, to which the later tokens have added their parts
    inputs = ()  # of a token, the newest first, without the earliest
    for back in tl.static_range(SIZE):
        taps = taps + (tl.load(weight + back * N + column, mask=inside, other=0.0).to(tl.float32),)
        sums = sums + (zeros,)
        if back > 0:
            ahead = 2 * (SIZE - 1) - back
            owed = owed + (zeros,)
            now = _input(row + (ahead + 1) * X_T, tail_end, last - (SIZE - 1) + ahead + 1, n, inside, SIZE, N, HAS_TAIL)
            inputs = inputs + (now.to(tl.float32),)
    for i in tl.static_range(SIZE - 1):  # tokens after the span, which use its last inputs
        ahead = SIZE - 1 - i
        t = last + ahead
        now = _input(row + ahead * X_T, tail_end, t - (SIZE - 1), n, inside, SIZE, N, HAS_TAIL)
        upstream = tl.load(up + ahead * pitch, mask=(t < n) & inside, other=0.0)
        position = _position(position_at + ahead, t, n, PACKED)
        _, _, inputs, owed = _step(now, upstream, position, scale, taps, inputs, owed, SIZE, SILU, NORM, EPS, PACKED)
    ahead = ()
    ups_ahead = ()
    places_ahead = ()
    if PREFETCH:
        for u in tl.static_range(ROWS):
            t = last - u
            ahead = ahead + (_input(row - u * X_T, tail_end, t - (SIZE - 1), n, inside, SIZE, N, HAS_TAIL),)
            ups_ahead = ups_ahead + (tl.load(up, mask=(t < n) & inside, other=0.0),)
            places_ahead = places_ahead + (_position(position_at - u, t, n, PACKED),)
            up -= pitch
        row -= ROWS * X_T
    AHEAD: tl.constexpr = ROWS if PREFETCH else 0
    for i in range(0, span, ROWS):
        rows = ()
        ups = ()
        places = ()
        for u in tl.static_range(ROWS):
            t = last - i - AHEAD - u
            rows = rows + (_input(row - u * X_T, tail_end, t - (SIZE - 1), n, inside, SIZE, N, HAS_TAIL),)
            ups = ups + (tl.load(up, mask=_is_token(t, n) & inside, other=0.0),)
            places = places + (_position(position_at - i - AHEAD - u, t, n, PACKED),)
            up -= pitch
        row -= ROWS * X_T
        if PREFETCH:
            current, current_ups, current_places = ahead, ups_ahead, places_ahead
            ahead, ups_ahead, places_ahead = rows, ups, places
        else:
            current, current_ups, current_places = rows, ups, places
        for u in tl.static_range(ROWS):
            t = last - i - u
            d_now, d_taps, inputs, owed = _step(
                current[u], current_ups[u], current_places[u], scale, taps, inputs, owed, SIZE, SILU, NORM, EPS, PACKED
            )
            totals = ()
            for back in tl.static_range(SIZE):
                totals = totals + (sums[back] + d_taps[back],)
            sums = totals
            tl.store(out - u * N, d_now.to(dx.dtype.element_ty), mask=(t < n) & inside)
        out -= ROWS * N
    for back in tl.static_range(SIZE):
        at = (block * SIZE + back).to(tl.int64) * N + column
        tl.store(d_weight + at, tl.sum(sums[back], 0)[None, :, :], mask=inside)
        if HAS_TAIL and back > 0:
            at = ((b + 1) * (SIZE - 1) - back) * N + column
            tl.store(d_tail + at, owed[back - 1].to(d_tail.dtype.element_ty), mask=(start == 0) & (n > 0) & inside)


@triton.jit(do_not_specialize=["batch", "n_tokens", "n_spans", "span", "x_b", "positions_b"])
def backward_kernel(
    x, weight, tail, positions, upstreams, dx, d_tail, d_weight, batch, n_tokens, n_spans, span, x_b, positions_b,
    SIZE: tl.constexpr, N: tl.constexpr, X_T: tl.constexpr, SILU: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, N_STRIPS: tl.constexpr, NORM_STRIPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr, HAS_TAIL: tl.constexpr, PACKED: tl.constexpr, WALKERS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """d_weight: a row of partial sums (SIZE, N) per block of walkers. PREFETCH: the next tokens are loaded before these
    are computed, some past the span too. PDL: the reduction may start before this ends. The rest as in the forward
    kernel."""
    if PDL:
        gdc_launch_dependents()
    x_b = x_b.to(tl.int64) * ALIGN
    strip, block = tl.program_id(0) % N_STRIPS, tl.program_id(0) // N_STRIPS
    if strip < NORM_STRIPS:
        _backward_strip(
            x, weight, tail, positions, upstreams, dx, d_tail, d_weight, batch, n_tokens, n_spans, span, x_b,
            positions_b, strip, block, SIZE, N, X_T, SILU, True, EPS, PARTS, HEAD_DIM, HAS_TAIL, PACKED,
            WALKERS, HEADS, BLOCK, ROWS, PREFETCH,
        )  # fmt: skip
    else:
        _backward_strip(
            x, weight, tail, positions, upstreams, dx, d_tail, d_weight, batch, n_tokens, n_spans, span, x_b,
            positions_b, strip, block, SIZE, N, X_T, SILU, False, EPS, PARTS, BLOCK, HAS_TAIL, PACKED,
            WALKERS, HEADS, BLOCK, ROWS, PREFETCH,
        )  # fmt: skip
