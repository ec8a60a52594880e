"""The kernels of linear attention against the reference in float64: outputs, states and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import decayed_linear_attention
from fusedlm.ops.linear_attention import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.linear_attention.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "final state", "q", "k", "v", "log_decay", "state")
# B, T, G, H, K, V
SHAPES = [
    (1, 1, 1, 2, 5, 7),
    (2, 63, 2, 2, 16, 16),
    (1, 64, 1, 1, 64, 32),
    (2, 65, 1, 1, 24, 40),
    (1, 130, 1, 2, 8, 20),
]


def _inputs(shape, *, with_state=True, decay=1.0, resets=0.0, dtype=torch.float32):
    batch, n, groups, heads, key, value = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    q, k, v = draw(batch, n, groups, key), draw(batch, n, groups, key), draw(batch, n, heads, value)
    state = draw(batch, heads, key, value) if with_state else None
    log_decay = -decay * F.softplus(draw(batch, n, heads))
    reset = (torch.rand(batch, n, generator=g) < resets).to(DEVICE) if resets else None
    upstream = draw(batch, n, heads, value).to(dtype), draw(batch, heads, key, value)
    return [q.to(dtype), k.to(dtype), v.to(dtype), log_decay, state], reset, upstream


def _run(function, tensors, reset, upstream, dtype=None):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves, reset, 64)
    pairs = [(x, y.to(x.dtype)) for x, y in zip(out, upstream, strict=True) if y is not None]
    outputs, upstream = zip(*pairs, strict=True)
    used = [x for x in leaves if x is not None]
    return [*(x.detach() for x in out), *torch.autograd.grad(outputs, used, upstream, materialize_grads=True)]


def _check(tensors, reset, upstream, floor=2e-6, function=kernels.decayed_linear_attention):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, reset, upstream)
    same = _run(reference.decayed_linear_attention, tensors, reset, upstream)
    exact = _run(reference.decayed_linear_attention, tensors, reset, upstream, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=False):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens and segments of one chunk."""
    tiling = kernels.Tiling(columns=16, num_warps=4, stages=1, resident=4)
    monkeypatch.setitem(kernels.TILINGS, torch.float32, [kernels.Tilings(256, 256, 16, tiling, tiling, tiling)])
    monkeypatch.setattr(kernels, "_SEGMENT_CHUNKS", 1)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("resets", [0.0, 0.05])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape, resets, with_state, poisoned):
    tensors, reset, upstream = _inputs(shape, with_state=with_state, resets=resets)
    _check(tensors, reset, upstream)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("resets", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("n", [16, 33, 100, 130])
def test_segments(n, resets, with_state, small_chunks, poisoned):
    """Of one sequence and head, which are too few for any device; also with a reset before every token."""
    tensors, reset, upstream = _inputs((1, n, 1, 1, 8, 12), with_state=with_state, resets=resets)
    launch = kernels._Launch(tensors[1], tensors[2], reset, "forward")
    assert launch.n_segments == min(12, launch.n_chunks) or launch.per_segment > 1
    _check(tensors, reset, upstream)


def test_several_blocks_of_values(small_chunks, poisoned):
    tensors, reset, upstream = _inputs((1, 37, 1, 1, 20, 40), resets=0.05)
    _check(tensors, reset, upstream)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 20.0])
@pytest.mark.parametrize("small", [True, False])
def test_weak_and_strong_decay(decay, small, request, poisoned):
    """From none to 1280 in a chunk."""
    if small:
        request.getfixturevalue("small_chunks")
    tensors, reset, upstream = _inputs((1, 130, 1, 1, 16, 16), decay=decay)
    _check(tensors, reset, upstream)


def test_the_gradient_of_a_strong_decay_has_no_rounding_error_of_others():
    """Each token sees its neighbour through e^-20 and itself through 1; the second has no part in the gradient."""
    (q, k, v, log_decay, _), _, (upstream, _) = _inputs((1, 64, 1, 1, 16, 16), with_state=False)
    tensors = [q, k, v, torch.full_like(log_decay, -20.0), None]
    found, exact = (
        _run(f, tensors, None, (upstream, None), dtype)[5]
        for f, dtype in ((kernels.decayed_linear_attention, None), (reference.decayed_linear_attention, torch.float64))
    )
    assert_close(found, exact, 1e-4)  # sums of 1280 are exact to 1e-4


@pytest.mark.parametrize("which", ["output", "final state"])
def test_one_output_alone_has_gradients(which, small_chunks, poisoned):
    tensors, reset, (upstream, d_final) = _inputs((1, 40, 1, 1, 8, 8), resets=0.05)
    _check(tensors, reset, (upstream, None) if which == "output" else (None, d_final))


def test_one_row_of_resets_is_broadcast_over_the_batch():
    tensors, reset, upstream = _inputs((2, 70, 1, 1, 8, 8), resets=0.05)
    both = _run(kernels.decayed_linear_attention, tensors, reset[:1].expand(2, -1), upstream)
    one = _run(kernels.decayed_linear_attention, tensors, reset[:1], upstream)
    assert reset[0].any() and all(torch.equal(a, b) for a, b in zip(one, both, strict=True))


@pytest.mark.parametrize("resets", [0.0, 0.5])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (3, 1, 2, 4, 20, 36), (2, 1, 1, 2, 64, 200)], ids=str)
def test_one_token(shape, with_state, resets, poisoned):
    tensors, reset, _ = _inputs(shape, with_state=with_state, resets=resets)
    found = kernels.decayed_linear_attention(*tensors, reset)
    exact = reference.decayed_linear_attention(*(None if x is None else x.double() for x in tensors), reset, 64)
    for name, a, e in zip(NAMES, found, exact, strict=False):
        assert_close(a, e, 1e-6, name)


def test_states_are_saved_for_gradients_only(monkeypatch):
    saved = []
    forward = kernels._forward

    def spy(*arguments):
        saved.append(arguments[-1])
        return forward(*arguments)

    monkeypatch.setattr(kernels, "_forward", spy)
    tensors, _, _ = _inputs((1, 20, 1, 1, 8, 8))
    kernels.decayed_linear_attention(*tensors, None)
    with torch.no_grad():
        kernels.decayed_linear_attention(tensors[0].requires_grad_(), *tensors[1:], None)
    kernels.decayed_linear_attention(*tensors, None)
    assert saved == [False, False, True]


def test_slices_and_transposed_heads(poisoned):
    """As a packed projection gives them; what lies beside them is NaN."""
    tensors, reset, upstream = _inputs((2, 40, 2, 2, 16, 16))

    def function(q, k, v, log_decay, state, *rest):
        packed = torch.cat([torch.full_like(q, float("nan")), q, k, v], -1)
        _, q, k, v = packed.split(16, -1)
        heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, log_decay))
        k, log_decay = heads_first
        state = state.mT.contiguous().mT
        return kernels.decayed_linear_attention(q, k, v, log_decay, state, *rest)

    _check(tensors, reset, (upstream[0].transpose(0, 1).contiguous().transpose(0, 1), upstream[1]), function=function)


@pytest.mark.parametrize("save", [True, False])
def test_no_sequences(save):
    tensors, _, _ = _inputs((1, 5, 1, 2, 4, 4))
    tensors = [x[:0].requires_grad_(save) for x in tensors]
    out, final = kernels.decayed_linear_attention(*tensors, None)
    assert out.shape == (0, 5, 2, 4) and final.shape == (0, 2, 4, 4)
    if save:
        gradients = torch.autograd.grad(out.sum() + final.sum(), tensors)
        assert [x.shape for x in gradients] == [x.shape for x in tensors]


def test_dtypes_of_gradients():
    """Those of their tensors; q and k are cast to the dtype of v."""
    tensors, reset, upstream = _inputs((1, 20, 1, 1, 8, 8))
    tensors = [tensors[0].double(), tensors[1], tensors[2], tensors[3].bfloat16(), tensors[4].double()]
    found = _run(kernels.decayed_linear_attention, tensors, reset, upstream)
    assert [x.dtype for x in found] == [torch.float32] * 2 + [x.dtype for x in tensors]


@pytest.mark.parametrize("resets", [0.0, 0.1])
@pytest.mark.parametrize("with_state", [True, False])
def test_operators_pass_opcheck(with_state, resets):
    tensors, reset, (upstream, d_final) = _inputs((2, 19, 1, 2, 8, 4), with_state=with_state, resets=resets)
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.decayed_linear_attention.default, (*leaves, reset, True))
    plain = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.decayed_linear_attention.default, (*plain, reset, False))
    states = kernels._forward(*plain, reset, True)[2]
    arguments = (upstream.transpose(0, 1).contiguous().transpose(0, 1), d_final, *plain, reset, states)
    torch.library.opcheck(torch.ops.fusedlm.decayed_linear_attention_backward.default, arguments)


def test_full_graph():
    tensors, reset, upstream = _inputs((1, 20, 1, 2, 8, 8), resets=0.1)

    def function(q, *rest):
        return kernels.decayed_linear_attention(2 * q, *rest)

    plain = _run(function, tensors, reset, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, reset, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    q, v, log_decay = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 2, 5), torch.zeros(2, 3, 2)
    for arguments, message in [
        ((q[0], q, v, log_decay), r"q \(3, 1, 4\)"),
        ((q, q[:, :2], v, log_decay), r"k \(2, 2, 1, 4\)"),
        ((q, q, v, log_decay[..., :1]), r"log_decay \(2, 3, 1\)"),
        ((q[:, :0], q[:, :0], v[:, :0], log_decay[:, :0]), "must be at least 1"),
        ((q.expand(2, 3, 3, 4), q.expand(2, 3, 3, 4), v, log_decay), "H a multiple of G"),
    ]:
        with pytest.raises(ValueError, match=message):
            decayed_linear_attention(*arguments)
    with pytest.raises(ValueError, match=r"state \(1, 2, 4, 5\) must be \(2, 2, 4, 5\)"):
        decayed_linear_attention(q, q, v, log_decay, state_BHKV=torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match=r"reset \(2, 3\) of torch.int64 must be bool"):
        decayed_linear_attention(q, q, v, log_decay, reset_BT=torch.zeros(2, 3, dtype=torch.int64))


# Narrow tiles beside wide ones, for which Triton 3.6 has made some products in loops read a wrong address.
NARROW = [
    (1, 300, 1, 2, *widths) for widths in ((16, 64), (32, 64), (16, 128), (32, 128), (64, 16), (128, 16), (128, 32))
]


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        *NARROW,
        (2, 1000, 4, 4, 64, 64),
        (1, 4097, 1, 2, 64, 128),
        (1, 1000, 2, 2, 128, 128),
        (1, 257, 1, 1, 256, 256),
    ],
    ids=str,
)
def test_kernels_on_a_gpu(shape, decay, poisoned):
    """States and the log decay, float32 in the reference, have the error of bfloat16 operands here."""
    tensors, reset, upstream = _inputs(shape, decay=decay, resets=0.003, dtype=torch.bfloat16)
    _check(tensors, reset, upstream, floor=8e-3)


@pytest.mark.gpu
def test_long_sequence_on_a_gpu():
    tensors, reset, upstream = _inputs((1, 70_000, 2, 2, 64, 64), decay=1e-3, dtype=torch.bfloat16)
    _check(tensors, reset, upstream, floor=8e-3)


@pytest.mark.gpu
def test_gradients_are_reproducible():
    tensors, reset, upstream = _inputs((1, 4000, 1, 4, 64, 128), decay=0.1, dtype=torch.bfloat16)
    first, second = (_run(kernels.decayed_linear_attention, tensors, reset, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    heads, n = 128, 2**17 + 64
    v = torch.randn(1, n, heads, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, n, 1, 64, device="cuda", dtype=torch.bfloat16)
    log_decay = torch.full((1, n, heads), -2.0, device="cuda")
    out, _ = kernels.decayed_linear_attention(k, k, v, log_decay, None, None)
    last = slice(n - 64, None)  # what is before has decayed to e^-128
    expected, _ = reference.decayed_linear_attention(
        k[:, last], k[:, last], v[:, last], log_decay[:, last], None, None, 64
    )
    assert_close(out[:, last], expected, 1e-2)
