"""Block wiring with the kernels of its ops: gradients and decoding are those of the reference."""

import pytest
import torch

from fusedlm import build_model
from fusedlm.ops.common.dispatch import recorded
from fusedlm.testing import MIXER_CASES, assert_close, backend_of, part_model, randomise_, wired_config

mixing = pytest.importorskip("fusedlm.ops.mixing.triton")
xsa = pytest.importorskip("fusedlm.ops.xsa.triton")
VOCAB, T = 61, 9
TOKENS = torch.randint(0, VOCAB, (2, T), generator=torch.Generator().manual_seed(3))
XSA_MIXERS = [case for cases in MIXER_CASES.values() for case in cases if "xsa: true" in case]


def _gradients(model):
    model.zero_grad()
    output = model(TOKENS, targets=TOKENS.roll(-1, 1))
    output.total().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": output.nll.detach()}


def _assert_same(found, expected):
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 2e-5, name)


def _model(pattern, **changes):
    model = randomise_(build_model(wired_config(pattern, **changes), vocab_size=VOCAB, seed=0))
    for name, p in model.named_parameters():
        if name.endswith(("mix_x0", "head.weight")):
            torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(5))  # else of little effect
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"x0_mixing": False}, {"unet_skips": False}, {"depth_scaled_norms": False}], ids=str
)
def test_mixing_and_norm_in_one_op(changes):
    model = _model("gagg", **changes)
    expected, fired = _gradients(model), []
    for block in model.blocks:
        block.mixer_norm.register_forward_hook(lambda *_: fired.append(1))
    with backend_of("mix_inputs", mixing.mix_inputs), recorded() as calls:
        _assert_same(_gradients(model), expected)
    mixes = [True] * 4 if model.blocks[0].mixes_x0 else [block.takes_skip for block in model.blocks]
    assert len([op for op, backend, _ in calls if (op, backend) == ("mix_inputs", "test")]) == 2 * sum(mixes) > 0
    assert len(fired) == 4, "norms are still called"


def test_mixing_with_recomputed_mixers():
    """The norm is computed with the mix and saved, not recomputed."""
    model, fired = _model("gggg"), []
    expected = _gradients(model)
    for block in model.blocks:
        block.mixer_norm.register_forward_hook(lambda *_: fired.append(1))
    model.recompute("mixer")
    _assert_same(_gradients(model), expected)
    assert len(fired) == 8
    with backend_of("mix_inputs", mixing.mix_inputs):
        _assert_same(_gradients(model), expected)
    assert len(fired) == 12


def test_what_runs_is_explained():
    found = _model("gagg").explain("cpu", torch.float32)
    assert found["a.exclude_own_value"].backend == found["g.mix_inputs"].backend == "reference"
    assert (
        not {"a.mix_inputs", "a.exclude_own_value"}
        & part_model("{type: attention, n_heads: 2}").explain("cpu", torch.float32).keys()
    )
    assert "a.exclude_own_value" in part_model("{type: mla, n_heads: 2, kv_rank: 8, xsa: true}").explain(
        "cpu", torch.float32
    )


def test_a_norm_that_the_projection_computes_is_left_to_it():
    model = _model("aa")
    expected = _gradients(model)
    model.use_backends({"rmsnorm_linear": "test"})
    packed = pytest.importorskip("fusedlm.ops.norm_linear.triton").packed_rmsnorm_linear
    mixed = []
    with backend_of("mix_inputs", lambda *x: mixed.append(x)), backend_of("rmsnorm_linear", packed):
        _assert_same(_gradients(model), expected)
    assert not mixed


@pytest.mark.parametrize("mixer", XSA_MIXERS)
def test_exclusive_self_attention_in_a_mixer(mixer):
    torch.manual_seed(3)
    model = randomise_(part_model(mixer))
    expected, calls = _gradients(model), []

    def counted(*tensors):
        calls.append(1)
        return xsa.exclude_own_value(*tensors)

    with backend_of("exclude_own_value", counted):
        _assert_same(_gradients(model), expected)
    assert len(calls) >= 2


@torch.no_grad()
def test_decoding():
    """Two rows, then one alone, whose norm is left to the projection of one token."""
    model = _model("avg")
    with backend_of("mix_inputs", mixing.mix_inputs), backend_of("exclude_own_value", xsa.exclude_own_value):
        for tokens in (TOKENS, TOKENS[:1]):
            expected = model(tokens).logits
            state = model.init_state(len(tokens))
            pieces = [model(tokens[:, a:b], state=state).logits for a, b in ((0, 4), (4, 5), (5, T))]
            assert_close(torch.cat(pieces, dim=1), expected, 1e-5)
    assert_close(model(TOKENS[:1]).logits, expected, 1e-5)


def test_full_graphs():
    torch._dynamo.reset()
    model = _model("aa")
    expected = _gradients(model)
    with backend_of("mix_inputs", mixing.mix_inputs), backend_of("exclude_own_value", xsa.exclude_own_value):
        model.compile_blocks(backend="aot_eager")
        _assert_same(_gradients(model), expected)
