import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import gated_delta_rule
from fusedlm.ops.delta_rule.reference import chunked, recurrent
from fusedlm.testing import assert_close


def _inputs(batch=2, n=37, heads=3, key=5, value=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    q, k = normal(batch, n, heads, key), F.normalize(normal(batch, n, heads, key), dim=-1)
    v, state = normal(batch, n, heads, value), normal(batch, heads, key, value)
    log_decay, beta = -F.softplus(normal(batch, n, heads)), normal(batch, n, heads).sigmoid()
    return [q, k, v, log_decay, beta, state]


RESETS = [None, [0], [5, 6, 20], list(range(37))]


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 37, 64])
def test_chunked_equals_recurrent(chunk_size, resets):
    inputs = [x.requires_grad_() for x in _inputs()]
    reset = None
    if resets is not None:
        reset = torch.zeros(2, 37, dtype=torch.bool)
        reset[0, resets] = True
    results = [recurrent(*inputs, reset), chunked(*inputs, reset, chunk_size)]
    weight = torch.randn_like(results[0][0])
    gradients = [
        torch.autograd.grad((out * weight).sum() + final.square().sum(), inputs, allow_unused=True)
        for out, final in results
    ]
    assert_close(results[1][0], results[0][0], 1e-10, "output")
    assert_close(results[1][1], results[0][1], 1e-10, "state")
    for name, a, b in zip(["q", "k", "v", "log_decay", "beta", "state"], gradients[1], gradients[0], strict=True):
        assert_close(a, b, 1e-10, f"gradient of {name}")


def test_recurrent_is_the_definition():
    """With (K, K) matrices, as in the paper."""
    q, k, v, log_decay, beta, state = _inputs(batch=1, n=9, heads=1)
    out, final = recurrent(q, k, v, log_decay, beta, state)
    s = state[0, 0]
    for t in range(9):
        key, b = k[0, t, 0], beta[0, t, 0]
        s = log_decay[0, t, 0].exp() * (torch.eye(5, dtype=s.dtype) - b * torch.outer(key, key)) @ s
        s = s + b * torch.outer(key, v[0, t, 0])
        assert_close(out[0, t, 0], s.mT @ q[0, t, 0], 1e-12, f"output {t}")
    assert_close(final[0, 0], s, 1e-12, "state")


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_gradcheck(form):
    inputs = [x.requires_grad_() for x in _inputs(batch=1, n=5, heads=2, key=2, value=3)]
    reset = torch.tensor([[False, False, False, True, False]])
    extra = {"chunk_size": 4} if form is chunked else {}
    assert torch.autograd.gradcheck(lambda *x: form(*x, reset, **extra), inputs)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])
def test_float32_is_close_to_float64(n):
    exact = _inputs(n=n)
    single = [x.float() for x in exact]
    expected = gated_delta_rule(*exact[:5], state_BHKV=exact[5])
    actual = gated_delta_rule(*single[:5], state_BHKV=single[5])
    assert actual[0].dtype == torch.float32
    for a, b, name in zip(actual, expected, ("output", "state"), strict=True):
        assert_close(a, b, 2e-6, name)


def test_strong_decay_is_finite():
    q, k, v, _, beta, state = _inputs(n=64, dtype=torch.float32)
    log_decay = torch.full((2, 64, 3), -50.0).requires_grad_()
    out, final = gated_delta_rule(q, k, v, log_decay, beta, state_BHKV=state)
    (out.sum() + final.sum()).backward()
    assert torch.isfinite(out).all() and torch.isfinite(log_decay.grad).all()


def test_bfloat16_inputs_accumulate_in_float32():
    inputs = _inputs(n=40)
    expected, _ = gated_delta_rule(*inputs[:5])
    out, state = gated_delta_rule(*[x.bfloat16() for x in inputs[:5]])
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(out, expected, 1e-2, "output")
