import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import decayed_linear_attention
from fusedlm.ops.linear_attention.reference import chunked, recurrent
from fusedlm.testing import assert_close

NAMES = ["q", "k", "v", "log_decay", "state"]


def _inputs(batch=2, n=37, groups=2, heads=4, key=5, value=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    q, k, v = normal(batch, n, groups, key), normal(batch, n, groups, key), normal(batch, n, heads, value)
    return [q, k, v, -F.softplus(normal(batch, n, heads)), normal(batch, heads, key, value)]


def _resets(rows: dict[int, list[int]], n=37):
    reset = torch.zeros(2, n, dtype=torch.bool)
    for row, where in rows.items():
        reset[row, where] = True
    return reset


RESETS = [None, {0: [0]}, {0: [5, 6, 20], 1: [16]}, {0: list(range(37))}]


@pytest.mark.parametrize("groups, heads", [(3, 3), (2, 4), (1, 3)])
@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 37, 64])
def test_chunked_equals_recurrent(chunk_size, resets, groups, heads):
    inputs = [x.requires_grad_() for x in _inputs(groups=groups, heads=heads)]
    reset = None if resets is None else _resets(resets)
    results = [recurrent(*inputs, reset), chunked(*inputs, reset, chunk_size)]
    weight = torch.randn_like(results[0][0])
    gradients = [torch.autograd.grad((out * weight).sum() + final.square().sum(), inputs) for out, final in results]
    assert_close(results[1][0], results[0][0], 1e-10, "output")
    assert_close(results[1][1], results[0][1], 1e-10, "state")
    for name, a, b in zip(NAMES, gradients[1], gradients[0], strict=True):
        assert_close(a, b, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_is_the_sum_over_earlier_tokens(form):
    """o_t = sum_s (product of the decays after s) (q_t.k_s) v_s for each head; value heads 0 and 1 use the first q and
    k, 2 and 3 the second."""
    q, k, v, log_decay, state = _inputs(batch=1, n=9)
    out, _ = form(q, k, v, log_decay, torch.zeros_like(state))
    for head in range(4):
        for t in range(9):
            expected = torch.zeros(7, dtype=torch.float64)
            for s in range(t + 1):
                score = q[0, t, head // 2] @ k[0, s, head // 2] * log_decay[0, s + 1 : t + 1, head].sum().exp()
                expected += score * v[0, s, head]
            assert_close(out[0, t, head], expected, 1e-12, f"head {head}, token {t}")


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_gradcheck(form):
    inputs = [x.requires_grad_() for x in _inputs(batch=1, n=5, groups=1, heads=2, key=2, value=3)]
    reset = torch.tensor([[False, False, False, True, False]])
    extra = {"chunk_size": 2} if form is chunked else {}
    assert torch.autograd.gradcheck(lambda *x: form(*x, reset, **extra), inputs)


def test_one_row_of_resets_is_broadcast_over_the_batch():
    *inputs, state = _inputs()
    both = _resets({0: [3, 20], 1: [3, 20]})
    expected = decayed_linear_attention(*inputs, state_BHKV=state, reset_BT=both, chunk_size=8)
    actual = decayed_linear_attention(*inputs, state_BHKV=state, reset_BT=both[:1], chunk_size=8)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])
def test_float32_is_close_to_float64(n):
    exact = _inputs(n=n)
    single = [x.float() for x in exact]
    expected = decayed_linear_attention(*exact[:4], state_BHKV=exact[4])
    actual = decayed_linear_attention(*single[:4], state_BHKV=single[4])
    assert actual[0].dtype == torch.float32
    for a, b, name in zip(actual, expected, ("output", "state"), strict=True):
        assert_close(a, b, 2e-6, name)


def test_without_decay_nothing_is_forgotten():
    """The state is the sum of 2000 equal writes."""
    k, v = torch.ones(1, 2000, 1, 3), torch.ones(1, 2000, 1, 2)
    out, state = decayed_linear_attention(k, k, v, torch.zeros(1, 2000, 1))
    assert torch.equal(state, torch.full((1, 1, 3, 2), 2000.0))
    assert torch.equal(out[0, :, 0, 0], 3 * torch.arange(1.0, 2001.0))


def test_strong_decay_is_finite():
    q, k, v, _, state = _inputs(n=130, dtype=torch.float32)
    log_decay = torch.full((2, 130, 4), -50.0).requires_grad_()
    out, final = decayed_linear_attention(q, k, v, log_decay, state_BHKV=state)
    (out.sum() + final.sum()).backward()
    assert torch.isfinite(log_decay.grad).all()
    alone = (q * k).sum(-1).repeat_interleave(2, dim=2)[..., None] * v  # each token sees itself only
    assert_close(out, alone, 1e-6)


def test_bfloat16_inputs_accumulate_in_float32():
    inputs = _inputs(n=40)
    expected, _ = decayed_linear_attention(*inputs[:4])
    out, state = decayed_linear_attention(*[x.bfloat16() for x in inputs[:4]])
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(out, expected, 1e-2, "output")
