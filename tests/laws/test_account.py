"""Parameters, FLOPs and state bytes as computed are those of the live tensors and of torch's FLOP counter."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusedlm.model.accounting import count_parameters, forward_flops, state_bytes, training_flops_per_token
from fusedlm.nn.ffn.routed import RoutedFFN
from fusedlm.nn.mixers.gdn import GatedDeltaNet
from fusedlm.nn.mixers.mamba2 import Mamba2
from fusedlm.nn.mixers.sdla import SelectiveDifferentialLinearAttention
from fusedlm.testing import MIXER_CASES, assert_close, backend_of, part_model
from tests.laws.definitions import (
    delta_rule,
    differential_linear_attention,
    linear_attention,
    window_attention,
)
from tests.laws.models import ALL_MODELS, N_TOKENS, VOCAB, recipe_models, some_tokens

LINEAR_TIME = (GatedDeltaNet, Mamba2, SelectiveDifferentialLinearAttention)
DEFINITIONS = {
    "gated_delta_rule": delta_rule,
    "decayed_linear_attention": linear_attention,
    "differential_linear_attention": differential_linear_attention,
    "packed_attention": window_attention,
}


@ALL_MODELS
def test_parameters(make):
    model = make()
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert count.embedding == model.embedding.weight.numel()


def _flops(model, output, batch, n_tokens) -> int:
    """As accounted for training; where tokens choose what runs, of what they chose and not of what is planned for
    them."""
    flops = batch * round(n_tokens * training_flops_per_token(model, n_tokens) / 3)
    routed = [module for module in model.modules() if isinstance(module, RoutedFFN)]
    for module, (*_, rest_rows, _) in zip(routed, output.metrics.get("routed", []), strict=True):
        flops += module.flops_of(batch * n_tokens, int(rest_rows)) - batch * module.flops(n_tokens)
    return flops


@contextlib.contextmanager
def _by_definition():
    """Ops whose products depend on how they are computed run as they are defined."""
    with contextlib.ExitStack() as stack:
        for op, function in DEFINITIONS.items():
            stack.enter_context(backend_of(op, function, fused=False))
        yield


@ALL_MODELS
@pytest.mark.parametrize("n_tokens", [1, 6, 16, N_TOKENS])
def test_flops(make, n_tokens, monkeypatch):
    _check_flops(make, n_tokens, monkeypatch)


@pytest.mark.parametrize("make", [*recipe_models()])
def test_recipes_in_their_width(make, monkeypatch):
    test_parameters(make)
    _check_flops(make, 3, monkeypatch)


def _check_flops(make, n_tokens, monkeypatch):
    monkeypatch.setattr("fusedlm.ops.attention.sdpa.one_width", lambda *heads: heads)  # padding is no work of the model
    model, tokens = make(), some_tokens(batch=3, n=n_tokens)
    for block in model.blocks:
        block.mixer.recomputes_output = False  # nor is what is recomputed
    with _by_definition(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            output = model(tokens, targets=tokens)
        assert counter.get_total_flops() == _flops(model, output, 3, n_tokens)
        with FlopCounterMode(display=False) as counter:
            output.total().backward()
    if not any(isinstance(block.mixer, LINEAR_TIME) for block in model.blocks):
        # The first state is a constant, so a recurrence has less to differentiate.
        assert counter.get_total_flops() == 2 * _flops(model, output, 3, n_tokens)
    if model.mtp is None:
        assert training_flops_per_token(model, n_tokens) == 3 * forward_flops(model, n_tokens) / n_tokens


@pytest.mark.parametrize("name", ["gdn", "sdla", "mamba2"])
def test_chunks_do_not_enter(name):
    case = MIXER_CASES[name][0]
    for_chunks = [part_model(case.replace("chunk_size: 8", f"chunk_size: {size}")) for size in (8, 64)]
    assert forward_flops(for_chunks[0], 128) == forward_flops(for_chunks[1], 128)
    assert forward_flops(for_chunks[0], 128) == 128 * forward_flops(for_chunks[0], 1), "linear in the length"


@pytest.mark.parametrize("case", [case for name in MIXER_CASES for case in MIXER_CASES[name] if "window" in case])
def test_the_definition_of_a_window_is_what_runs(case):
    """So that the test of FLOPs counts the right thing."""
    model, tokens = part_model(case).double(), some_tokens()
    expected = model(tokens).logits
    with _by_definition():
        assert_close(model(tokens).logits, expected, 1e-10)


@pytest.mark.parametrize("case", [case for name in ("gdn", "sdla", "mamba2") for case in MIXER_CASES[name]])
def test_the_definition_of_a_recurrence_is_what_runs(case):
    model, tokens = part_model(case), some_tokens()
    expected = model(tokens).logits
    with _by_definition():
        assert_close(model(tokens).logits, expected, 1e-5)


@ALL_MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state(make, dtype):
    model = make().to(dtype)
    for n_tokens in (1, 4, N_TOKENS):
        tokens = some_tokens(batch=3, n=n_tokens)
        for state in (model.init_state(3), model.init_state(3, max_tokens=n_tokens)):
            with torch.no_grad():
                model(tokens[:, : n_tokens // 2 + 1], state=state)
                if n_tokens // 2 + 1 < n_tokens:
                    model(tokens[:, n_tokens // 2 + 1 :], state=state)
            assert state.nbytes() == 3 * state_bytes(model, n_tokens, dtype)


@pytest.mark.parametrize("case", [case for name in ("gdn", "sdla", "mamba2") for case in MIXER_CASES[name]])
def test_the_state_of_linear_mixers_does_not_grow(case):
    model = part_model(case, vocab_size=VOCAB)
    state, sizes = model.init_state(1), []
    with torch.no_grad():
        for _ in range(4):
            model(some_tokens(batch=1), state=state)
            sizes.append(state.nbytes())
    assert set(sizes) == {state_bytes(model, 1, torch.float32)} == {state_bytes(model, 10**9, torch.float32)}
