"""The reference against the formula, the kernels against the reference in float64: outputs, states, every gradient."""

import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import differential_linear_attention
from fusedlm.ops.differential_linear import reference
from fusedlm.ops.linear_attention import reference as linear_attention
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.differential_linear.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "final state", "q", "k", "k_rope", "v", "log_decay", "weight", "gamma", "state")
SCALE, EPS = 0.5, 1e-6
# B, T, H, D, R, V
SHAPES = [
    (1, 1, 2, 5, 4, 7),
    (1, 63, 1, 16, 16, 16),
    (1, 64, 1, 32, 16, 32),
    (1, 65, 2, 8, 0, 12),
    (2, 40, 1, 20, 6, 24),
]


def _inputs(shape, *, with_state=True, decay=1.0, resets=0.0, kept=1.0, dtype=torch.float32):
    batch, n, heads, head_dim, rope_dim, value = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    q, k = draw(batch, n, 2 * heads, rope_dim + head_dim), draw(batch, n, 2 * heads, head_dim)
    k_rope, v = draw(batch, n, 2, rope_dim), draw(batch, n, heads, value)
    log_decay = -decay * F.softplus(draw(batch, n, heads))
    weight, gamma = 0.4 + 0.1 * draw(heads), 1 + 0.2 * draw(value)
    state = None
    if with_state:
        sums = draw(batch, 2 * heads, rope_dim + head_dim, value + 1)
        state = torch.cat([sums[..., :-1], 1 + sums[..., -1:].abs()], -1)
    angle = torch.arange(n)[:, None] * torch.rand(rope_dim // 2, generator=g)
    rope = tuple(x[None, :, None].to(DEVICE) for x in (angle.cos(), angle.sin())) if rope_dim else None
    reset = (torch.rand(batch, n, generator=g) < resets).to(DEVICE) if resets else None
    written = (torch.rand(batch, n, generator=g) < kept).to(DEVICE) if kept < 1 else None
    upstream = draw(batch, n, heads, value).to(dtype), draw(batch, 2 * heads, rope_dim + head_dim, value + 1)
    leaves = [*(x.to(dtype) for x in (q, k, k_rope, v)), log_decay, weight, gamma, state]
    return leaves, (rope, reset, written), upstream


def _call(function, leaves, options, dtype=None):
    *inputs, log_decay, weight, gamma, state = leaves
    rope, reset, written = options
    if rope is not None and dtype is not None:
        rope = tuple(x.to(dtype) for x in rope)
    if written is not None:
        log_decay = log_decay.masked_fill(~written[..., None], 0.0)
        reset = None if reset is None else reset & written
    return function(*inputs, log_decay, weight, gamma, rope, SCALE, EPS, state, reset, written, 64)


def _run(function, tensors, options, upstream, dtype=None):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = list(_call(function, leaves, options, dtype))
    if options[2] is not None:  # outputs of tokens that are not written mean nothing
        out[0] = out[0] * options[2][..., None, None]
    pairs = [(x, y.to(x.dtype)) for x, y in zip(out, upstream, strict=True) if y is not None]
    outputs, upstream = zip(*pairs, strict=True)
    used = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, used, upstream, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in out), *gradients]


def _uncancelled(q, k, k_rope, v, log_decay, weight, gamma, rope, scale, eps, state, reset, written, chunk_size):
    """The reference with normalisers and the root mean square of the norm as constants: its gradients are the terms
    that cancel in those of q and weight, here (B, T, H, V). That of log_decay includes what tokens keep for
    themselves."""
    heads, width = v.shape[2:]
    k = torch.cat([reference.rotate(k_rope, rope).repeat_interleave(heads, dim=2), k], dim=-1)
    q, k = (reference.features(x * scale) for x in (reference.rotate(q, rope), k))
    k = k * (log_decay - log_decay.detach()).exp().repeat(1, 1, 2)[..., None]
    values = F.pad(v, (0, 1), value=1.0)
    if written is not None:
        values = values.masked_fill(~written[..., None, None], 0.0)
    streams = (q, k, values.repeat(1, 1, 2, 1), log_decay.repeat(1, 1, 2))
    sums, state = linear_attention.decayed_linear_attention(*streams, state, reset, chunk_size)
    weighted, normaliser = sums.split([width, 1], dim=-1)
    signal, noise = (weighted / normaliser.detach().masked_fill(normaliser == 0, 1.0)).chunk(2, dim=2)
    y = signal - weight * noise
    return y * (y.detach().square().mean(-1, keepdim=True) + eps).rsqrt() * gamma, state


def _check(tensors, options, upstream, floor=1e-5, function=kernels.differential_linear_attention):
    """Within four times the error of the reference in the same precision, or within the floor: relative to what is
    compared or, for gradients of q, log_decay and weight, to the terms that cancel in it. In bfloat16 the gradient of
    weight sums products of tensors that are rounded to 2^-9 where they are saved; such errors are independent and add
    up as the norm of the products does, of which 2^-8 are allowed."""
    found = _run(function, tensors, options, upstream)
    same = _run(reference.differential_linear_attention, tensors, options, upstream)
    exact = _run(reference.differential_linear_attention, tensors, options, upstream, torch.float64)
    weight, values = tensors[5], tensors[3]
    each = [*tensors[:5], weight[:, None].expand(values.shape), *tensors[6:]]
    terms = _run(_uncancelled, each, options, upstream, torch.float64)
    for name, a, s, e, t in zip(NAMES, found, same, exact, terms, strict=False):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        if not e.any():  # the log decay of a first token, from which nothing was there before
            assert not a.numel() or a.abs().max() < 1e-6, name
        else:
            summed = t.sum((0, 1, 3)) if name == "weight" else t
            cancelled = max(1.0, float(summed.norm() / e.norm())) if name in ("q", "log_decay", "weight") else 1.0
            rounded = 2**-8 * float(t.norm() / e.norm()) if name == "weight" and values.dtype == torch.bfloat16 else 0.0
            assert_close(a, e, max(4 * error_ratio(s, e), floor * cancelled, rounded), name)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens and segments of one chunk."""
    tiling = kernels.Tiling(num_warps=4, stages=1, resident=4)
    monkeypatch.setitem(kernels.TILINGS, torch.float32, kernels.Tilings(16, tiling, tiling, tiling, tiling))
    monkeypatch.setattr(kernels, "_SEGMENT_CHUNKS", 1)
    monkeypatch.setattr(kernels, "_NORM_TILES", 2)
    monkeypatch.setattr(kernels, "_NORM_ROWS", 8)


@pytest.mark.parametrize("resets", [False, True])
def test_is_the_formula(resets):
    """Token by token, stream by stream, for one head; the sums of features are the last column of the state."""
    leaves, (rope, _, _), _ = _inputs((1, 9, 1, 4, 2, 3))
    q, k, k_rope, v, log_decay, weight, gamma, state = (x.double()[0] for x in leaves)
    cos, sin = (x.double()[0] for x in rope)
    reset = torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    reset[0, 5] = resets
    out, final = differential_linear_attention(
        *(x.double() for x in leaves[:7]), rope=(cos[None], sin[None]), scale=SCALE, eps=EPS,
        state_BNKE=leaves[7].double(), reset_BT=reset, backend="reference",
    )  # fmt: skip

    def turned(x, t):
        return torch.stack([x[0] * cos[t, 0, 0] - x[1] * sin[t, 0, 0], x[1] * cos[t, 0, 0] + x[0] * sin[t, 0, 0]])

    for t in range(9):
        decay = log_decay[t].exp() * ~reset[0, t]
        parts = []
        for i in range(2):
            u_q = SCALE * torch.cat([turned(q[t, i, :2], t), q[t, i, 2:]])
            u_k = SCALE * torch.cat([turned(k_rope[t, i], t), k[t, i]])
            q_i, k_i = (1 + u + u**2 / 2 for u in (u_q, u_k))
            state[i] = decay * state[i] + torch.outer(k_i, torch.cat([v[t, 0], v.new_ones(1)]))
            sums = state[i].T @ q_i
            parts.append(sums[:-1] / sums[-1])
        y = parts[0] - leaves[5].double() * parts[1]
        assert_close(out[0, t, 0], y / (y.square().mean() + EPS).sqrt() * leaves[6].double(), 1e-12, f"token {t}")
    assert_close(final[0], state, 1e-12)


def test_gradients_of_the_reference():
    leaves, options, _ = _inputs((1, 5, 2, 3, 2, 3), resets=0.3)
    leaves, options = (
        [x.double().requires_grad_() for x in leaves],
        (tuple(x.double() for x in options[0]), *options[1:]),
    )
    assert torch.autograd.gradcheck(lambda *x: _call(reference.differential_linear_attention, x, options), leaves)


@pytest.mark.parametrize("with_state, resets", [(True, 0.05), (False, 0.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape, with_state, resets, poisoned):
    _check(*_inputs(shape, with_state=with_state, resets=resets))


@pytest.mark.parametrize("with_state, resets", [(True, 0.03), (False, 0.0)])
@pytest.mark.parametrize("n", [16, 50, 80])
def test_segments(n, with_state, resets, small_chunks, poisoned):
    _check(*_inputs((1, n, 1, 16, 4, 16), with_state=with_state, resets=resets))


@pytest.mark.parametrize("decay", [0.0, 1e-3, 20.0])
def test_weak_and_strong_decay(decay, small_chunks, poisoned):
    _check(*_inputs((1, 40, 1, 16, 16, 16), decay=decay))


@pytest.mark.parametrize("shape", [(2, 40, 1, 16, 4, 16), (2, 40, 1, 10, 0, 16)], ids=str)
def test_tokens_that_are_not_written(shape, small_chunks, poisoned):
    _check(*_inputs(shape, resets=0.1, kept=0.7))


@pytest.mark.filterwarnings("ignore:divide by zero")  # of quotients that are not used
def test_tokens_before_the_first_written_one_have_no_output():
    leaves, (rope, _, _), _ = _inputs((1, 6, 1, 16, 4, 16), with_state=False)
    written = torch.tensor([[False, False, True, True, False, True]], device=DEVICE)
    for function in (kernels.differential_linear_attention, reference.differential_linear_attention):
        out, _ = _call(function, leaves, (rope, None, written))
        assert not out[:, :2].any() and torch.isfinite(out).all()


@pytest.mark.parametrize("which", ["output", "final state"])
def test_one_output_alone_has_gradients(which, small_chunks, poisoned):
    leaves, options, (upstream, d_final) = _inputs((1, 40, 1, 16, 4, 16), resets=0.05)
    _check(leaves, options, (upstream, None) if which == "output" else (None, d_final))


@pytest.mark.filterwarnings("ignore:divide by zero")  # of quotients that are not used
@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("shape", [(3, 1, 2, 20, 6, 9), (2, 1, 1, 64, 16, 64), (1, 1, 1, 1, 0, 1)], ids=str)
def test_one_token(shape, with_state, kept, poisoned):
    leaves, options, _ = _inputs(shape, with_state=with_state, resets=0.5, kept=kept)
    found = _call(kernels.differential_linear_attention, leaves, options)
    doubles = [None if x is None else x.double() for x in leaves]
    exact = _call(reference.differential_linear_attention, doubles, options, torch.float64)
    for name, a, e in zip(NAMES, found, exact, strict=False):
        assert_close(a, e, 2e-6, name)


def test_positions_of_each_row():
    """A table per row of the batch."""
    leaves, (rope, *rest), upstream = _inputs((2, 20, 1, 16, 4, 16))
    rope = tuple(torch.cat([x, x.flip(1)]) for x in rope)
    _check(leaves, (rope, *rest), upstream)


def test_slices_and_transposed_heads(poisoned):
    """As packed projections give them; what lies beside them is NaN."""
    leaves, options, upstream = _inputs((2, 20, 2, 16, 4, 16))

    def function(q, k, k_rope, v, *rest):
        packed = torch.cat([torch.full_like(k, float("nan")), k, q], -1)
        _, k, q = packed.split([16, 16, 20], -1)
        v, k_rope = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (v, k_rope))
        return kernels.differential_linear_attention(q, k, k_rope, v, *rest)

    _check(leaves, options, (upstream[0].transpose(0, 1).contiguous().transpose(0, 1), upstream[1]), function=function)


@pytest.mark.parametrize("save", [True, False])
def test_no_sequences(save):
    leaves, (rope, _, _), _ = _inputs((1, 5, 2, 4, 2, 4))
    leaves = [x if x.ndim == 1 else x[:0] for x in leaves]
    leaves = [x.detach().requires_grad_(save) for x in leaves]
    out, final = _call(kernels.differential_linear_attention, leaves, (rope, None, None))
    assert out.shape == (0, 5, 2, 4) and final.shape == (0, 4, 6, 5)
    if save:
        gradients = torch.autograd.grad(out.sum() + final.sum(), leaves)
        assert [x.shape for x in gradients] == [x.shape for x in leaves] and not gradients[6].any()


def test_dtypes_of_gradients():
    """Those of their tensors; q and k are cast to the dtype of v."""
    leaves, options, upstream = _inputs((1, 10, 1, 16, 4, 16))
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.float64]
    leaves = [x.to(dtype) for x, dtype in zip(leaves, [*dtypes, torch.float64], strict=True)]
    found = _run(kernels.differential_linear_attention, leaves, options, upstream)
    assert [x.dtype for x in found] == [torch.float32] * 2 + [x.dtype for x in leaves]


@pytest.mark.parametrize("with_state, rope_dim", [(True, 4), (False, 0)])
def test_operators_pass_opcheck(with_state, rope_dim):
    leaves, (rope, reset, _), (upstream, d_final) = _inputs(
        (1, 9, 2, 8, rope_dim, 4), with_state=with_state, resets=0.2
    )
    tables = rope or (None, None)
    rest = (reset, None, SCALE, EPS)
    plain = (*leaves[:5], *tables, *leaves[5:])
    operator = torch.ops.fusedlm.differential_linear_attention.default
    torch.library.opcheck(operator, (*plain, *rest, False))
    saved = kernels._forward(*plain, *rest, True)[2:]
    arguments = (upstream, d_final, *plain, *rest[:2], *saved, SCALE, EPS)
    torch.library.opcheck(torch.ops.fusedlm.differential_linear_attention_backward.default, arguments)
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    torch.library.opcheck(operator, (*leaves[:5], *tables, *leaves[5:], *rest, True))


def test_full_graph():
    leaves, options, upstream = _inputs((1, 10, 1, 8, 4, 8), resets=0.1)

    def function(q, *rest):
        return kernels.differential_linear_attention(2 * q, *rest)

    plain = _run(function, leaves, options, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves, options, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    leaves, (rope, _, _), _ = _inputs((2, 3, 2, 8, 4, 6))
    good = {"rope": rope, "state_BNKE": leaves[7]}

    def changed(i, x):
        return [*leaves[:i], x, *leaves[i + 1 : 7]]

    for arguments, options, message in [
        (changed(0, leaves[0][..., :-1]), good, r"q \(2, 3, 4, 11\)"),
        (changed(1, leaves[1][:, :, 1:]), good, r"k \(2, 3, 3, 8\)"),
        (changed(0, leaves[0][:1]), good, "must have the same B and T"),
        (changed(5, leaves[5][:1]), good, r"weight \(1,\) and gamma \(6,\) must be"),
        (leaves[:7], {"rope": None}, r"rope \[\] must be two tables"),
        (leaves[:7], {"rope": tuple(x[:, 1:] for x in rope)}, r"rope \[\(1, 2, 1, 2\)"),
        (leaves[:7], good | {"state_BNKE": leaves[7][:1]}, r"state \(1, 4, 12, 7\) must be \(2, 4, 12, 7\)"),
        (leaves[:7], good | {"reset_BT": torch.zeros(2, 3)}, r"reset \(2, 3\) of torch.float32 must be bool"),
        (leaves[:7], good | {"written_BT": torch.ones(1, 3, dtype=torch.bool)}, r"written \(1, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            differential_linear_attention(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("shape", [*SHAPES[:4], (2, 1000, 2, 64, 16, 64), (1, 4097, 2, 64, 16, 64)], ids=str)
def test_kernels_on_a_gpu(shape, decay, poisoned):
    """In bfloat16 the reference computes in float32; the kernels multiply features and states in bfloat16."""
    _check(*_inputs(shape, decay=decay, resets=0.003, dtype=torch.bfloat16), floor=2e-2)


@pytest.mark.gpu
def test_long_sequence_on_a_gpu():
    _check(*_inputs((1, 70_000, 2, 64, 16, 64), decay=1e-3, dtype=torch.bfloat16), floor=2e-2)


@pytest.mark.gpu
def test_gradients_are_reproducible():
    arguments = _inputs((1, 4000, 4, 64, 16, 64), decay=0.1, dtype=torch.bfloat16)
    first, second = (_run(kernels.differential_linear_attention, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
