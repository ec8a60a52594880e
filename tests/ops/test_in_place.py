"""Recurrences that overwrite their state: what they give otherwise, in the memory of the state."""

import pytest
import torch
import torch.nn.functional as F

from fusedlm.nn.rope import rope_table
from fusedlm.ops import decayed_linear_attention, differential_linear_attention, gated_delta_rule, gated_scan
from fusedlm.ops.delta_rule import triton as delta_kernels
from fusedlm.ops.differential_linear import triton as differential_kernels
from fusedlm.ops.linear_attention import triton as linear_kernels
from fusedlm.ops.scan import triton as scan_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = [gated_delta_rule, decayed_linear_attention]
KERNELS = {gated_delta_rule: delta_kernels, decayed_linear_attention: linear_kernels}


def _inputs(op, n_tokens=1, values=40):
    g = torch.Generator().manual_seed(n_tokens)

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    q, k = (F.normalize(draw(3, n_tokens, 2, 9), dim=-1) for _ in range(2))
    tensors = [q, k, draw(3, n_tokens, 4, values), -F.softplus(draw(3, n_tokens, 4))]
    if op is gated_delta_rule:
        tensors.append(draw(3, n_tokens, 4).sigmoid())
    return tensors, draw(3, 4, 9, values)


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("op", OPS)
def test_the_state_is_overwritten(op, n_tokens):
    tensors, state = _inputs(op, n_tokens)
    out, after = op(*tensors, state_BHKV=state, backend="reference")
    own = state.clone()
    found, returned = op(*tensors, state_BHKV=own, in_place=True, backend="reference")
    assert returned.data_ptr() == own.data_ptr()
    assert torch.equal(found, out) and torch.equal(own, after)


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("op", OPS)
def test_the_kernels_overwrite_the_state(op, n_tokens):
    tensors, state = _inputs(op, n_tokens)
    run = getattr(KERNELS[op], op.__name__)
    reset = torch.zeros(3, n_tokens, dtype=torch.bool, device=DEVICE)
    reset[1, 0] = True
    for resets in (None, reset):
        out, after = run(*tensors, state, resets, 64)
        own = state.clone()
        found, returned = run(*tensors, own, resets, 64, in_place=True)
        assert returned is own and torch.equal(found, out) and torch.equal(own, after)


@pytest.mark.parametrize("op", OPS)
def test_operators_pass_opcheck(op):
    tensors, state = _inputs(op)
    step = torch.ops.fusedlm.gated_delta_rule_step_ if op is gated_delta_rule else None
    step = step or torch.ops.fusedlm.decayed_linear_attention_step_
    torch.library.opcheck(step.default, (*tensors, state, None))


@pytest.mark.parametrize("op", OPS)
def test_states_that_cannot_be_overwritten(op):
    tensors, state = _inputs(op)
    for given, words in (
        (None, "state None"),
        (state.double(), "state torch.float64"),
        (state.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            op(*tensors, state_BHKV=given, in_place=True)
    with pytest.raises(ValueError, match="overwrites a state"):
        op(*tensors, state_BHKV=state.requires_grad_(), in_place=True)
    with torch.no_grad():
        op(*tensors, state_BHKV=state, in_place=True)


def _differential(n_tokens, rope_dim=4):
    """Tensors, options in the order of the backends, and a state."""
    g = torch.Generator().manual_seed(n_tokens)

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    tensors = [draw(3, n_tokens, 4, rope_dim + 6), draw(3, n_tokens, 4, 6), draw(3, n_tokens, 2, rope_dim)]
    tensors += [draw(3, n_tokens, 2, 5), -F.softplus(draw(3, n_tokens, 2)), draw(2).sigmoid(), draw(5)]
    positions = torch.randint(99, (3, n_tokens), generator=g).to(DEVICE)
    rope = rope_table(positions, rope_dim, 1e4, torch.float32) if rope_dim else None
    state = draw(3, 4, rope_dim + 6, 6).abs() + 1.0  # normalisers are positive
    return tensors, rope, state


@pytest.mark.parametrize(("n_tokens", "rope_dim"), [(1, 4), (1, 0), (5, 4)])
def test_differential_linear_attention(n_tokens, rope_dim):
    tensors, rope, state = _differential(n_tokens, rope_dim)
    reset = torch.zeros(3, n_tokens, dtype=torch.bool, device=DEVICE)
    reset[1, 0] = True
    for resets in (None, reset):
        out, after = differential_linear_attention(
            *tensors, rope=rope, state_BNKE=state, reset_BT=resets, backend="reference"
        )
        own = state.clone()
        found, returned = differential_linear_attention(
            *tensors, rope=rope, state_BNKE=own, reset_BT=resets, in_place=True, backend="reference"
        )
        assert returned.data_ptr() == own.data_ptr() and torch.equal(found, out) and torch.equal(own, after)
        options = rope, 0.5, 1e-6
        run = differential_kernels.differential_linear_attention
        out, after = run(*tensors, *options, state, resets, None, 64)
        own = state.clone()
        found, returned = run(*tensors, *options, own, resets, None, 64, in_place=True)
        assert returned is own and torch.equal(found, out) and torch.equal(own, after)


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_gated_scan(n_tokens):
    g = torch.Generator().manual_seed(0)
    gate, new = (torch.rand(3, n_tokens, 70, generator=g).to(DEVICE) for _ in range(2))
    state = torch.randn(3, 70, generator=g).to(DEVICE)
    reset = torch.zeros(3, n_tokens, dtype=torch.bool, device=DEVICE)
    reset[1, 0] = True
    for resets in (None, reset):
        out, after = gated_scan(gate, new, state_BC=state, reset_BT=resets, backend="reference")
        own = state.clone()
        found, returned = gated_scan(gate, new, state_BC=own, reset_BT=resets, in_place=True, backend="reference")
        assert returned.data_ptr() == own.data_ptr() and torch.equal(found, out) and torch.equal(own, after)
        out, after = scan_kernels.gated_scan(gate, new, state, resets)
        own = state.clone()
        found, returned = scan_kernels.gated_scan(gate, new, own, resets, in_place=True)
        assert returned is own and torch.equal(found, out) and torch.equal(own, after)


def test_operators_of_sdla_pass_opcheck():
    tensors, rope, state = _differential(1)
    cos, sin = rope
    arguments = (*tensors[:5], cos, sin, *tensors[5:], state, None, None, 0.5, 1e-6)
    torch.library.opcheck(torch.ops.fusedlm.differential_linear_attention_step_.default, arguments)
    gate, new = torch.rand(2, 3, 1, 7, device=DEVICE)
    torch.library.opcheck(
        torch.ops.fusedlm.gated_scan_step_.default, (gate, new, torch.rand(3, 7, device=DEVICE), None)
    )


def test_states_of_sdla_that_cannot_be_overwritten():
    tensors, rope, state = _differential(1)
    with pytest.raises(ValueError, match="state torch.float64"):
        differential_linear_attention(*tensors, rope=rope, state_BNKE=state.double(), in_place=True)
    gate, new = torch.rand(2, 3, 1, 7, device=DEVICE)
    with pytest.raises(ValueError, match="state None"):
        gated_scan(gate, new, in_place=True)
    with pytest.raises(ValueError, match="overwrites a state"):
        gated_scan(gate, new, state_BC=torch.rand(3, 7, device=DEVICE, requires_grad=True), in_place=True)
