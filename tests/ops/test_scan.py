import pytest
import torch

from fusedlm.ops import gated_scan
from fusedlm.ops.scan.reference import blocked, recurrent
from fusedlm.testing import assert_close


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
