"""The kernels of the gated delta rule against the reference in float64: outputs, states and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import gated_delta_rule
from fusedlm.ops.delta_rule import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.delta_rule.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "end", "q", "k", "v", "log_decay", "beta", "state")
# batch, tokens, key heads, value heads, key width, value width
SHAPES = [(2, 70, 1, 2, 16, 16), (1, 65, 2, 2, 20, 9), (1, 64, 1, 1, 16, 80), (1, 63, 1, 1, 8, 24), (1, 1, 1, 1, 4, 4)]


def _inputs(shape, *, decay=1.0, dtype=torch.float32):
    """q, k, v, log decays, beta and a state; upstream gradients of the output and of the state at the end."""
    batch, tokens, groups, heads, keys, values = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    q, k = (F.normalize(draw(batch, tokens, groups, keys), dim=-1) for _ in range(2))
    v, state = draw(batch, tokens, heads, values), draw(batch, heads, keys, values)
    log_decay = -decay * F.softplus(draw(batch, tokens, heads))
    beta = draw(batch, tokens, heads).sigmoid()
    tensors = [q.to(dtype), k.to(dtype), v.to(dtype), log_decay, beta, state]
    return tensors, (draw(batch, tokens, heads, values).to(dtype), draw(batch, heads, keys, values))


def _resets(shape, where, rows=None):
    if where is None:
        return None
    reset = torch.zeros(rows or shape[0], shape[1], dtype=torch.bool, device=DEVICE)
    reset[0, where] = True
    return reset


def _run(function, tensors, upstream, reset, dtype=None):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, end = function(*leaves, reset, 64)
    inputs = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(
        (out, end), inputs, [u.to(o.dtype) for u, o in zip(upstream, (out, end), strict=True)]
    )
    return [out.detach(), end.detach(), *gradients]


def _check(tensors, upstream, reset=None, floor=2e-6, function=kernels.gated_delta_rule):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, upstream, reset)
    same = _run(reference.gated_delta_rule, tensors, upstream, reset)
    exact = _run(reference.gated_delta_rule, tensors, upstream, reset, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=False):
        assert a.dtype == s.dtype, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def _cut(monkeypatch, n_segments):
    """Cut every sequence into segments, as where there are few."""

    def cut(shape):
        return kernels.triton.cdiv(shape.chunks, kernels.triton.cdiv(shape.chunks, n_segments))

    monkeypatch.setattr(kernels._Shape, "_n_segments", cut)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, poisoned):
    _check(*_inputs(shape))


@pytest.mark.parametrize("where", [[0], [5, 6, 63, 64, 69]])
def test_documents(where, poisoned):
    _check(*_inputs(SHAPES[0]), _resets(SHAPES[0], where))


def test_one_row_of_resets_for_all_rows():
    tensors, upstream = _inputs(SHAPES[0])
    _check(tensors, upstream, _resets(SHAPES[0], [3, 66], rows=1))


def test_without_a_state():
    tensors, upstream = _inputs(SHAPES[0])
    _check([*tensors[:5], None], upstream)


@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_no_decay_and_strong_decay(decay, poisoned):
    _check(*_inputs((1, 70, 1, 1, 16, 16), decay=decay), floor=5e-6)


def test_strong_and_weak_decays_in_one_chunk():
    tensors, upstream = _inputs((1, 70, 1, 1, 16, 16))
    tensors[3] = torch.where(torch.arange(70, device=DEVICE)[None, :, None] % 3 == 0, -20.0, -0.01)
    _check(tensors, upstream, floor=5e-6)


def test_equal_keys():
    """The powers of A would have entries of 10^18, the inverse has none above 1."""
    tensors, upstream = _inputs((1, 64, 1, 1, 16, 16))
    tensors[1] = tensors[1][:, :1].expand(-1, 64, -1, -1)
    tensors[3], tensors[4] = torch.zeros_like(tensors[3]), torch.ones_like(tensors[4])
    _check(tensors, upstream, floor=5e-6)


@pytest.mark.parametrize("n_segments, with_state, where", [(2, True, None), (3, False, [5, 64, 200]), (4, True, [70])])
def test_segments(n_segments, with_state, where, poisoned, monkeypatch):
    _cut(monkeypatch, n_segments)
    shape = (1, 250, 1, 1, 16, 20)
    tensors, upstream = _inputs(shape)
    _check([*tensors[:5], tensors[5] if with_state else None], upstream, _resets(shape, where))


def test_few_long_sequences_are_cut(monkeypatch):
    q = torch.empty(1, 64 * 100, 1, 16)
    assert kernels._Shape(q, q, q, None).segments > 1
    assert kernels._Shape(q[:, :64], q[:, :64], q[:, :64], None).segments == 1
    many = q[:, :640].expand(64, -1, 64, -1)
    assert kernels._Shape(many, many, many, None).segments == 1


@pytest.mark.parametrize("shape", [(1, 70, 1, 1, 32, 16), (1, 70, 1, 2, 16, 40), (1, 66, 1, 1, 48, 40)])
def test_several_blocks_of_keys_and_values(shape, poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "_KEY_BLOCK", 16)
    monkeypatch.setattr(kernels, "_VALUE_BLOCK", 16)
    _check(*_inputs(shape), _resets(shape, [3, 64]))


@pytest.mark.parametrize("n_segments", [1, 2])
def test_keys_in_halves(n_segments, poisoned, monkeypatch):
    """Keys wider than 64 are held in halves, of which the second is shorter here."""
    _cut(monkeypatch, n_segments)
    _check(*_inputs((1, 130, 1, 1, 80, 16)), _resets((1, 130), [3, 64]))


def test_views():
    """Slices of one packed projection, transposed keys, an expanded upstream gradient."""
    tensors, upstream = _inputs((1, 70, 1, 1, 16, 16))

    def function(q, k, v, *rest):
        packed = torch.cat([q, torch.full_like(q, float("nan")), v], dim=-1)
        return kernels.gated_delta_rule(packed[..., :16], k.mT.contiguous().mT, packed[..., 32:], *rest)

    _check(tensors, (upstream[0][:, :1].expand(-1, 70, -1, -1), upstream[1]), function=function)


def test_keys_of_another_dtype():
    tensors, upstream = _inputs((1, 5, 1, 1, 16, 16))
    tensors[:2] = [x.double() for x in tensors[:2]]
    found = _run(kernels.gated_delta_rule, tensors, upstream, None)
    assert [x.dtype for x in found[2:5]] == [torch.float64, torch.float64, torch.float32]


@pytest.mark.parametrize("part", [0, 1])
def test_gradient_of_one_result(part):
    """Of the output alone, and of the state alone."""
    tensors, upstream = _inputs((1, 66, 1, 1, 16, 16))
    gradients = []
    for function, dtype in ((kernels.gated_delta_rule, torch.float32), (reference.gated_delta_rule, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        gradients.append(
            torch.autograd.grad(function(*leaves, None, 64)[part], leaves, upstream[part].to(dtype), allow_unused=True)
        )
    for name, a, e in zip(NAMES[2:], *gradients, strict=True):
        if e is None:  # the state does not depend on q
            assert name == "q" and not a.any()
        else:
            assert_close(a, e, 5e-6, name)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("where", [None, [0]])
@pytest.mark.parametrize("with_state", [True, False])
def test_inference(tokens, where, with_state, poisoned):
    """Without gradients nothing is saved; a single token takes a kernel of its own."""
    shape = (2, tokens, 1, 2, 20, 40)
    (*tensors, state), _ = _inputs(shape)
    state, reset = state if with_state else None, _resets(shape, where)
    found = kernels.gated_delta_rule(*tensors, state, reset, 64)
    wide = [None if x is None else x.double() for x in (*tensors, state)]
    for name, a, e in zip(NAMES, found, reference.gated_delta_rule(*wide, reset, 64), strict=False):
        assert_close(a, e, 2e-6, name)


@pytest.mark.parametrize("shape", [(0, 5, 1, 1, 16, 16), (2, 5, 1, 1, 16, 0)])
def test_empty_tensors(shape):
    tensors, upstream = _inputs(shape)
    for a, e in zip(
        _run(kernels.gated_delta_rule, tensors, upstream, None),
        _run(reference.gated_delta_rule, tensors, upstream, None),
        strict=True,
    ):
        assert a.shape == e.shape and not a.any()


@pytest.mark.parametrize("width", [16, 80])
def test_saved_for_backward(width):
    """q and k; G, beta, W, and the inverses and states of chunks, with the scores of wide keys. Not v."""
    tensors, _ = _inputs((2, 70, 1, 2, width, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels.gated_delta_rule(*(x.requires_grad_() for x in tensors), None, 64)
    assert all(x.data_ptr() != tensors[2].data_ptr() for x in saved)
    squares = [(2, 2, 2, 64, 64)] * (2 if width > 64 else 1)
    of_inputs = [tuple(x.shape) for x in tensors[:3]]  # W is like v
    expected = [*of_inputs, (2, 2, 128), (2, 2, 128), *squares, (2, 2, 2, 16, width)]
    assert sorted(tuple(x.shape) for x in saved if x.numel()) == sorted(expected)


def test_operators_pass_opcheck():
    tensors, (d_out, d_end) = _inputs((1, 66, 1, 2, 16, 16))
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.gated_delta_rule.default, (*leaves, None))
    detached = [x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.gated_delta_rule_inference.default, (*detached, None))
    q, k, *_ = detached
    saved = torch.ops.fusedlm.gated_delta_rule(*detached, None)[2:]
    arguments = (d_out, d_end, q, k, *saved, None)
    torch.library.opcheck(torch.ops.fusedlm.gated_delta_rule_backward.default, arguments)


def test_under_fullgraph_compile():
    tensors, upstream = _inputs((1, 66, 1, 2, 16, 16))
    compiled = torch.compile(kernels.gated_delta_rule, fullgraph=True, backend="aot_eager")
    for a, e in zip(
        _run(compiled, tensors, upstream, None), _run(kernels.gated_delta_rule, tensors, upstream, None), strict=True
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: (1, 5, 2, 16)}, "must be \\(B, T, G, K\\) twice"),
        ({2: (1, 5, 3, 16)}, "3 value heads cannot share 2 key heads"),
        ({3: (1, 5, 1)}, "log_decay \\(1, 5, 1\\) must be \\(1, 5, 4\\)"),
        ({5: (1, 4, 16, 9)}, "state \\(1, 4, 16, 9\\) must be"),
        ({0: (1, 0, 2, 8), 1: (1, 0, 2, 8), 2: (1, 0, 4, 8)}, "at least one token"),
    ],
)
def test_shapes_that_do_not_match(change, message):
    shapes = [(1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 4, 8), (1, 5, 4), (1, 5, 4), (1, 4, 8, 8)]
    q, k, v, log_decay, beta, state = (torch.ones(change.get(i, shape)) for i, shape in enumerate(shapes))
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(q, k, v, log_decay, beta, state_BHKV=state)


def test_resets_are_bool():
    x, gate = torch.ones(1, 5, 2, 8), torch.ones(1, 5, 2)
    with pytest.raises(ValueError, match="must be bool"):
        gated_delta_rule(x, x, x, gate, gate, reset_BT=torch.ones(1, 5))


GPU_SHAPES = [
    (8, 1, 2, 4, 64, 64), (2, 63, 2, 2, 32, 32), (1, 64, 2, 2, 96, 48), (2, 65, 1, 2, 64, 64), (1, 300, 1, 1, 256, 256),
    (1, 1000, 2, 4, 128, 128), (1, 4097, 1, 2, 64, 128), (1, 4097, 1, 1, 128, 64), (1, 70_000, 1, 1, 64, 64),
    # Narrow tiles beside wide ones, for which Triton 3.6 has made some products in loops read a wrong address.
    *((1, 300, 1, 2, *widths) for widths in ((16, 64), (32, 64), (16, 128), (32, 128), (64, 16), (128, 32))),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_bfloat16(shape, decay):
    """Products have bfloat16 operands, each rounded by up to 2^-9, where the reference computes in float32. Eight rows
    of a single token: the gradient of one beta is a sum whose terms may cancel."""
    torch.full((2**28,), float("nan"), device=DEVICE)  # what is allocated next
    tensors, upstream = _inputs(shape, decay=decay, dtype=torch.bfloat16)
    reset = torch.rand(1, shape[1], device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) < 0.01
    _check(tensors, upstream, reset, floor=8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 300, 1, 2, 64, 64), (1, 9000, 1, 1, 64, 64), (1, 300, 2, 2, 128, 128)], ids=str)
def test_float32(shape):
    torch.full((2**28,), float("nan"), device=DEVICE)
    _check(*_inputs(shape), _resets(shape, [3, 64, 200]), floor=5e-6)
