"""One token alone: norms, activations and residual sums fused with the projections, in every mixer and feed-forward."""

import pytest
import torch

from fusedlm.nn.linear import Linear
from fusedlm.nn.pending import PendingNorm, PendingProduct
from fusedlm.ops.common.dispatch import recorded
from fusedlm.testing import FFN_CASES, MIXER_CASES, NO_FFN, assert_close, backend_of, part_model, randomise_

kernels = pytest.importorskip("fusedlm.ops.one_token.triton")
PARTS = [(case, "{type: swiglu, hidden: 24}") for cases in MIXER_CASES.values() for case in cases]
PARTS += [("{type: gdn, n_heads: 2, chunk_size: 8}", case) for cases in FFN_CASES.values() for case in cases]
PARTS += [(MIXER_CASES["mamba2"][0], NO_FFN), (MIXER_CASES["attention"][0], NO_FFN)]
TOKENS = torch.randint(61, (1, 5), generator=torch.Generator().manual_seed(0))


def _model(mixer, ffn, **changes):
    extra = "\n".join(f"{key}: {value}" for key, value in changes.items())
    return randomise_(part_model(mixer, ffn, vocab_size=61, extra=extra)).eval()


@torch.no_grad()
def _decoded(model):
    state = model.init_state(1)
    return torch.cat([model(TOKENS[:, a:b], state=state).logits for a, b in ((0, 3), (3, 4), (4, 5))], dim=1)


@pytest.mark.parametrize(("mixer", "ffn"), PARTS)
def test_every_part_has_the_logits_of_separate_layers(mixer, ffn):
    model = _model(mixer, ffn)
    expected = _decoded(model)
    with backend_of("token_linear", kernels.token_linear), recorded() as ran:
        assert_close(_decoded(model), expected, 1e-5)
    assert ran.count(("token_linear", "test", {})) > 3


def test_the_kernels_of_a_layer(monkeypatch):
    """Norm and projection, projection and sum, norm and up, activation and down and sum: four of them."""
    model = _model("{type: attention, n_heads: 4}", "{type: relu2, hidden: 24}")
    calls = []

    def counted(x, weight, gain, eps, activation, slope, residual, dtype):
        calls.append((gain is not None, activation, residual is not None))
        return kernels.token_linear(x, weight, gain, eps, activation, slope, residual, dtype)

    with backend_of("token_linear", counted):
        state = model.init_state(1)
        with torch.no_grad():
            model(TOKENS[:, :4], state=state)
            calls.clear()
            model(TOKENS[:, 4:], state=state)
    layer = [(True, None, False), (False, None, True), (True, None, False), (False, "relu2", True)]
    assert calls == layer * len(model.blocks) + [(True, None, False)]


def test_several_tokens_rows_and_gradients_run_separate_layers():
    model = _model("{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 4}", "{type: swiglu, hidden: 24}")
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output]))
    with backend_of("token_linear", kernels.token_linear):
        with torch.no_grad():
            model(TOKENS)
            model(TOKENS[:, :1].expand(2, -1))
        model(TOKENS[:, :1])
        assert not any(isinstance(x, PendingNorm | PendingProduct) for x in seen)
        with torch.no_grad():
            model(TOKENS[:, :1])
    assert {type(x) for x in seen} >= {PendingNorm, PendingProduct}


def test_dropout_of_a_branch_is_applied():
    model = _model("{type: attention, n_heads: 4}", "{type: relu2, hidden: 24}", dropout=0.5).train()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(TOKENS[:, :1]).logits
        torch.manual_seed(0)
        with backend_of("token_linear", kernels.token_linear):
            assert_close(model(TOKENS[:, :1]).logits, expected, 1e-5)
        assert not torch.equal(model(TOKENS[:, :1]).logits, expected)


def test_a_replaced_layer_gets_tensors():
    model = _model("{type: attention, n_heads: 4}", "{type: relu2, hidden: 24}")
    expected = _decoded(model)
    for module in list(model.modules()):
        if isinstance(module, Linear):
            module.fuses = False
    with backend_of("token_linear", kernels.token_linear):
        assert_close(_decoded(model), expected, 1e-5)


def test_rotation_in_one_kernel():
    rotary = pytest.importorskip("fusedlm.ops.rotary.triton")
    for case in (case for name in ("attention", "mla", "diff_mla", "cmd_mla") for case in MIXER_CASES[name]):
        model = _model(case, "{type: swiglu, hidden: 24}")
        expected = _decoded(model)
        with backend_of("rmsnorm_rope", rotary.rmsnorm_rope), recorded() as ran:
            assert_close(_decoded(model), expected, 1e-5)
        # Gains by dimension are no part of the kernels.
        assert (ran.count(("rmsnorm_rope", "test", {})) > 3) == ("qk_gain: dim" not in case)


@torch.no_grad()
def _static_decoded(model):
    """Steps of three rows of different lengths, and everything in their caches at the end."""
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))
    state = model.init_state(3)
    model(tokens[:, :7], state=state, lengths=[7, 2, 5])
    state.make_static(16)
    logits = [model(step, state=state).logits for step in tokens[:, 7:].split(1, dim=1)]
    return torch.cat(logits, dim=1), [x.clone() for part in state.parts() for x in part.tensors()]


@pytest.mark.parametrize(
    "case", [case for name in ("attention", "mla", "diff_mla", "cmd_mla") for case in MIXER_CASES[name]]
)
def test_rotation_and_append_in_one_kernel(case):
    rotary = pytest.importorskip("fusedlm.ops.rotary.triton")
    model = _model(case, "{type: swiglu, hidden: 24}")
    expected, caches = _static_decoded(model)
    with backend_of("rope_append", rotary.rope_append), recorded() as ran:
        found, own = _static_decoded(model)
    without = ("mla" in case and "rope_dim: 0" in case) or "qk_gain: dim" in case  # nothing to rotate, or no kernel
    assert ran.count(("rope_append", "test", {})) >= 9 * len(model.blocks) * (not without)
    assert_close(found, expected, 1e-5)
    for one, other in zip(own, caches, strict=True):
        assert_close(one, other, 1e-5)


def test_full_graph():
    model = _model("{type: gdn, n_heads: 2, chunk_size: 8}", "{type: swiglu, hidden: 24}")
    expected = _decoded(model)
    with backend_of("token_linear", kernels.token_linear), torch.no_grad():
        state = model.init_state(1)
        model(TOKENS[:, :2], state=state)
        state.make_static(6)
        model.compile_steps({"backend": "aot_eager"})
        found = torch.cat([model(TOKENS[:, i : i + 1], state=state).logits for i in (2, 3, 4)], dim=1)
    assert_close(found, expected[:, 2:], 1e-5)
