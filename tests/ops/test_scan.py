import pytest
import torch

from fusedlm.ops import gated_scan
from fusedlm.ops.scan.reference import blocked, recurrent
from fusedlm.ops.scan.reference import gated_scan as gated_scan_reference
from fusedlm.testing import assert_close, error_ratio


def _inputs(n, batch=2, channels=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    gate = torch.rand(batch, n, channels, generator=g, dtype=dtype)
    new = torch.randn(batch, n, channels, generator=g, dtype=dtype)
    return [gate, new, torch.randn(batch, channels, generator=g, dtype=dtype)]


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 37, 64, 65, 300])
def test_blocked_equals_recurrent(n):
    keep, new, state = [x.requires_grad_() for x in _inputs(n)]
    results = [form(keep, new, state) for form in (recurrent, blocked)]
    weight = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((out * weight).sum(), (keep, new, state)) for out in results]
    assert_close(results[1], results[0], 1e-12, "states")
    for name, a, b in zip(("keep", "input", "state"), gradients[1], gradients[0], strict=True):
        assert_close(a, b, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("resets", [None, [0], [5, 6, 20], list(range(37))])
def test_every_state_is_that_of_the_recurrence(resets):
    gate, new, state = _inputs(37)
    reset = None
    if resets is not None:
        reset = torch.zeros(2, 37, dtype=torch.bool)
        reset[0, resets] = True
    states, final = gated_scan(gate, new, state_BC=state, reset_BT=reset)
    for row in range(2):
        h = state[row]
        for t in range(37):
            if reset is not None and reset[row, t]:
                h = torch.zeros_like(h)
            h = (1 - gate[row, t]) * h + new[row, t]
            assert_close(states[row, t], h, 1e-12, f"row {row}, token {t}")
        assert_close(final[row], h, 1e-12, f"final of row {row}")


def test_gradcheck():
    inputs = [x.requires_grad_() for x in _inputs(11, batch=1, channels=2)]
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, 4] = True
    assert torch.autograd.gradcheck(lambda g, u, h: gated_scan(g, u, state_BC=h, reset_BT=reset), inputs)


def test_gates_of_0_and_1_are_exact_in_float32():
    """A gate of 0 keeps the state, a gate of 1 replaces it: products over thousands of tokens stay finite."""
    gate = torch.zeros(1, 5000, 2)
    gate[..., 1] = 1.0
    new = torch.zeros(1, 5000, 2, requires_grad=True)
    states, final = gated_scan(gate, new, state_BC=torch.tensor([[3.0, 3.0]]))
    assert torch.equal(states[..., 0], torch.full((1, 5000), 3.0)) and not states[..., 1].any()
    final.sum().backward()
    assert torch.equal(new.grad[0, :, 0], torch.ones(5000)) and torch.equal(new.grad[0, -2:, 1], torch.tensor([0.0, 1]))


def test_bfloat16_inputs_accumulate_in_float32():
    gate, new, _ = _inputs(400)
    expected, _ = gated_scan(gate, new)
    states, final = gated_scan(gate.bfloat16(), new.bfloat16())
    assert states.dtype == final.dtype == torch.float32
    assert_close(states, expected, 1e-2)


def test_the_final_state_owns_its_memory():
    _, final = gated_scan(*_inputs(40)[:2])
    assert final.untyped_storage().nbytes() == final.numel() * final.element_size()


kernels = pytest.importorskip("fusedlm.ops.scan.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("states", "final", "gate", "input", "state")


def _run(function, tensors, reset, upstream, dtype=None):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves, reset)
    pairs = [(x, y.to(x.dtype)) for x, y in zip(out, upstream, strict=True) if y is not None]
    outputs, upstream = zip(*pairs, strict=True)
    used = [x for x in leaves if x is not None]
    return [*(x.detach() for x in out), *torch.autograd.grad(outputs, used, upstream, materialize_grads=True)]


def _check(tensors, reset, upstream, floor=1e-6):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(kernels.gated_scan, tensors, reset, upstream)
    same = _run(gated_scan_reference, tensors, reset, upstream)
    exact = _run(gated_scan_reference, tensors, reset, upstream, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=False):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def _problem(batch, n, channels, with_state=True, resets=0.0, dtype=torch.float32):
    gate, new, state = (x.to(DEVICE) for x in _inputs(n, batch, channels, dtype=torch.float32))
    g = torch.Generator().manual_seed(n)
    reset = (torch.rand(batch, n, generator=g) < resets).to(DEVICE) if resets else None
    upstream = [torch.randn(shape, generator=g).to(DEVICE) for shape in ((batch, n, channels), (batch, channels))]
    return [gate.to(dtype), new.to(dtype), state if with_state else None], reset, upstream


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_TOKENS", 8)
    monkeypatch.setattr(kernels, "_CHANNELS", 2)


@pytest.mark.parametrize("with_state, resets", [(True, 0.1), (False, 0.0), (True, 1.0)])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_kernels(n, with_state, resets, poisoned):
    _check(*_problem(2, n, 3, with_state, resets))


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("with_state, resets", [(True, 0.1), (False, 0.0)])
def test_segments(with_state, resets, programs, small_blocks, poisoned, monkeypatch):
    """One segment of many blocks, and more segments than are read at a time."""
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    _check(*_problem(1, 150, 3, with_state, resets))


@pytest.mark.parametrize("which", ["states", "final"])
def test_one_output_alone_has_gradients(which, small_blocks, poisoned):
    tensors, reset, (upstream, d_final) = _problem(1, 20, 2, resets=0.1)
    _check(tensors, reset, (upstream, None) if which == "states" else (None, d_final))


def test_one_row_of_resets_and_slices(small_blocks, poisoned):
    """Halves of a packed projection, whose neighbours are NaN."""
    tensors, reset, upstream = _problem(2, 20, 4, resets=0.3)
    both = _run(kernels.gated_scan, tensors, reset[:1].expand(2, -1), upstream)

    def function(gate, new, *rest):
        packed = torch.cat([new, torch.full_like(new, float("nan")), gate], -1)
        return kernels.gated_scan(packed[..., 8:], packed[..., :4], *rest)

    one = _run(function, tensors, reset[:1], upstream)
    assert reset[0].any() and all(torch.equal(a, b) for a, b in zip(one, both, strict=True))


def test_no_sequences():
    leaves = [x[:0].requires_grad_() for x in _problem(1, 5, 3)[0]]
    states, final = kernels.gated_scan(*leaves, None)
    gradients = torch.autograd.grad(states.sum() + final.sum(), leaves)
    assert states.shape == (0, 5, 3) and [x.shape for x in gradients] == [x.shape for x in leaves]


def test_dtypes_of_gradients():
    tensors, reset, upstream = _problem(1, 9, 2)
    tensors = [tensors[0].bfloat16(), tensors[1].half(), tensors[2].double()]
    found = _run(kernels.gated_scan, tensors, reset, upstream)
    assert [x.dtype for x in found] == [torch.float32] * 2 + [x.dtype for x in tensors]


@pytest.mark.parametrize("with_state, resets", [(True, 0.2), (False, 0.0)])
def test_operators_pass_opcheck(with_state, resets):
    (gate, new, state), reset, (upstream, d_final) = _problem(2, 5, 2, with_state, resets)
    states, _ = kernels._forward(gate, new, state, reset)
    arguments = (upstream, d_final, gate, state, reset, states, torch.float32)
    torch.library.opcheck(torch.ops.fusedlm.gated_scan_backward.default, arguments)
    leaves = [None if x is None else x.requires_grad_() for x in (gate, new, state)]
    torch.library.opcheck(torch.ops.fusedlm.gated_scan.default, (*leaves, reset))


def test_full_graph():
    tensors, reset, upstream = _problem(1, 9, 2, resets=0.2)

    def function(gate, new, *rest):
        return kernels.gated_scan(gate, 2 * new, *rest)

    plain = _run(function, tensors, reset, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, reset, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"gate \(2, 3, 3\) and input \(2, 3, 4\)"):
        gated_scan(x[..., 1:], x)
    with pytest.raises(ValueError, match="T at least 1"):
        gated_scan(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"state \(2, 3\) must be \(2, 4\)"):
        gated_scan(x, x, state_BC=x[..., 0])
    with pytest.raises(ValueError, match=r"reset \(3, 3\) of torch.bool must be bool and \(B or 1, T\)"):
        gated_scan(x, x, reset_BT=torch.zeros(3, 3, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4, 1000, 64), (1, 70_000, 64), (3, 4097, 40), (64, 1, 64)], ids=str)
def test_kernels_on_a_gpu(shape, dtype, poisoned):
    _check(*_problem(*shape, resets=0.01, dtype=dtype), floor=1e-5)
