"""gdn and mamba2 with the kernels of the steps around their recurrences, in training, decoding and after a rollback."""

import contextlib

import pytest
import torch

from fusedlm.testing import assert_close, backend_of, part_model, randomise_

conv = pytest.importorskip("fusedlm.ops.conv.triton")
norm = pytest.importorskip("fusedlm.ops.gated_norm.triton")
CASES = [
    "{type: gdn, n_heads: 2, chunk_size: 8}",
    "{type: mamba2, n_heads: 4, head_dim: 6, state_dim: 10, n_groups: 2, conv_size: 3, chunk_size: 8}",
]
TOKENS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0]])


@contextlib.contextmanager
def _kernels():
    with backend_of("short_conv", conv.short_conv), backend_of("gated_rmsnorm", norm.gated_rmsnorm):
        yield


def _gradients(model):
    model.zero_grad()
    model(TOKENS, documents=DOCUMENTS, targets=TOKENS.roll(-1, 1)).total().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _decoded(model):
    """Rows of different lengths, one token, a draft of which each row keeps another part, and the rest."""
    state = model.init_state(2)
    logits = [model(TOKENS[:, :4], state=state, lengths=[4, 2]).logits[:, :2]]
    logits.append(model(TOKENS[:, 4:5], state=state).logits)
    mark = state.mark()
    model(TOKENS[:, 5:8], state=state)
    state.rollback(mark, [2, 0])
    logits.append(model(TOKENS[:, 7:9], state=state).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_kernels_in_a_mixer(case):
    model = randomise_(part_model(case))
    expected, decoded = _gradients(model), _decoded(model)
    with _kernels():
        found = _gradients(model)
        assert_close(_decoded(model), decoded, 1e-5)
    # Some gradients are small differences of large sums, whose rounding is that of the sums.
    rounding = 1e-7 * sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + rounding, name
