"""Recurrences that overwrite their state: what they give otherwise, in the memory of the state."""

import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import decayed_linear_attention, gated_delta_rule
from fusedlm.ops.delta_rule import triton as delta_kernels
from fusedlm.ops.linear_attention import triton as linear_kernels

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
