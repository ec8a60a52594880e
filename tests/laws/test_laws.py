"""The laws of every mixer, feed-forward and recipe. A new part is covered by its name in fusedlm.testing.models."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusedlm import build_model, load_recipe
from fusedlm.model.accounting import count_parameters, forward_flops, state_bytes, training_flops_per_token
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.ffn.routed import RoutedFFN
from fusedlm.nn.mixers import MIXERS
from fusedlm.nn.mixers.gdn import GatedDeltaNet
from fusedlm.nn.mixers.mamba2 import Mamba2
from fusedlm.nn.mixers.sdla import SelectiveDifferentialLinearAttention
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, part_model, randomise_

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VOCAB = 61
LINEAR_TIME = (GatedDeltaNet, Mamba2, SelectiveDifferentialLinearAttention)
N_TOKENS = 43  # odd, longer than windows and chunks, not a multiple of any


def _parts():
    for name, cases in MIXER_CASES.items():
        for index, case in enumerate(cases):
            yield pytest.param(lambda case=case: part_model(case, vocab_size=VOCAB), id=f"{name}-{index}")
    for name, cases in FFN_CASES.items():
        for index, case in enumerate(cases):
            mixer = MIXER_CASES["attention"][0]
            yield pytest.param(lambda case=case, mixer=mixer: part_model(mixer, case, VOCAB), id=f"{name}-{index}")
    yield pytest.param(
        lambda: part_model(MIXER_CASES["gdn"][0], vocab_size=VOCAB, extra="tie_embeddings: false, logit_softcap: 5.0"),
        id="untied-softcap",
    )


def _recipe_models():
    for path in RECIPES:
        recipe = load_recipe(path)
        one_period = recipe.model.model_copy(update={"n_layers": len(set(recipe.model.pattern))})
        pattern = "".join(sorted(set(recipe.model.pattern)))
        one_period = one_period.model_copy(update={"pattern": pattern})
        yield pytest.param(lambda config=one_period: build_model(config, vocab_size=VOCAB), id=path.stem)


ALL_MODELS = pytest.mark.parametrize("make", [*_parts(), *_recipe_models()])


def test_every_part_has_a_case():
    assert set(MIXER_CASES) == set(MIXERS)
    assert set(FFN_CASES) == set(FFNS)


def _model(make):
    torch.manual_seed(0)
    return randomise_(make()).double().eval()


def _tokens(batch=2, n=N_TOKENS):
    return torch.randint(0, VOCAB, (batch, n), generator=torch.Generator().manual_seed(1))


@ALL_MODELS
def test_causality(make):
    model, tokens = _model(make), _tokens()
    before = model(tokens)
    for t in (0, 1, 7, 8, 20, N_TOKENS - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t]), f"a change at {t} moved an earlier logit"
        assert not torch.equal(after[:, t], before[:, t]), f"a change at {t} did not move its own logit"


@ALL_MODELS
@pytest.mark.parametrize("reserve", [False, True])
def test_state(make, reserve):
    model, tokens = _model(make), _tokens()
    whole = model(tokens)
    assert torch.isfinite(whole).all()
    for cuts in ([1, 2, 3], [5, 6, 40], [42], list(range(1, N_TOKENS)), []):
        state = model.init_state(2, max_tokens=N_TOKENS if reserve else None)
        pieces = [model(tokens[:, a:b], state=state) for a, b in zip([0, *cuts], [*cuts, N_TOKENS], strict=True)]
        assert_close(torch.cat(pieces, dim=1), whole, 1e-10, f"cut at {cuts}")
        assert state.length == N_TOKENS


@ALL_MODELS
def test_documents(make):
    model, tokens = _model(make), _tokens()
    ends = [[0, 3, 4, 20, N_TOKENS], [0, 17, 41, 42, N_TOKENS]]
    documents = torch.zeros_like(tokens)
    for row, row_ends in enumerate(ends):
        for number, (a, b) in enumerate(zip(row_ends, row_ends[1:], strict=False)):
            documents[row, a:b] = 7 * number % 5  # numbers need not grow
    packed = model(tokens, documents)
    for row, row_ends in enumerate(ends):
        alone = [model(tokens[row : row + 1, a:b]) for a, b in zip(row_ends, row_ends[1:], strict=False)]
        assert_close(packed[row : row + 1], torch.cat(alone, dim=1), 1e-10, f"row {row}")
    assert not torch.allclose(packed, model(tokens)), "documents made no difference"
    for cuts in ([4, 18, 30], [1, 2, 3, 4, 5], [41, 42]):
        state = model.init_state(2)
        spans = zip([0, *cuts], [*cuts, N_TOKENS], strict=True)
        pieces = [model(tokens[:, a:b], documents[:, a:b], state) for a, b in spans]
        assert_close(torch.cat(pieces, dim=1), packed, 1e-10, f"packed, cut at {cuts}")


@ALL_MODELS
def test_documents_gradients(make):
    model, tokens = _model(make), _tokens(batch=1)
    targets = tokens.roll(-1, 1)
    documents = (torch.arange(N_TOKENS) >= 19).long()[None]
    model.loss(tokens, targets, documents).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model.loss(tokens[:, :19], targets[:, :19]).sum() + model.loss(tokens[:, 19:], targets[:, 19:]).sum()).backward()
    for name, parameter in model.named_parameters():
        assert_close(packed[name], parameter.grad, 1e-9, name)


def _starts():
    yield from _parts()
    for path in RECIPES:
        recipe = load_recipe(path)
        vocab = {"bytes": 257, "bpe": 2048, "file": 50257}[recipe.data.tokenizer.type]
        yield pytest.param(lambda config=recipe.model, vocab=vocab: build_model(config, vocab_size=vocab), id=path.stem)


@pytest.mark.parametrize("make", list(_starts()))
def test_start(make):
    torch.manual_seed(0)
    model = make().eval()
    tokens = torch.randint(0, model.vocab_size, (4, 65), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).mean().item()
    assert abs(loss / math.log(model.vocab_size) - 1) < 0.05


@ALL_MODELS
def test_account_parameters(make):
    model = make()
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert count.embedding == model.embedding.weight.numel()


def _solve_flops(a, b, *args, out_val=None, **kwargs) -> int:
    """A triangular solve of (..., n, n) for (..., n, m): n^2 m."""
    return a[-1] * math.prod(b)


SOLVE = {torch.ops.aten.linalg_solve_triangular: _solve_flops}


def _forward_flops(model, batch, n_tokens) -> int:
    """Of the last forward pass: where tokens choose what runs, what they chose and not what is planned for them."""
    flops = batch * forward_flops(model, n_tokens)
    for module in model.modules():
        if isinstance(module, RoutedFFN):
            flops += module.flops_of(batch * n_tokens, *module.counts().tolist()[3:]) - batch * module.flops(n_tokens)
    return flops


@ALL_MODELS
@pytest.mark.parametrize("n_tokens", [1, 6, N_TOKENS, 64])
def test_account_flops(make, n_tokens, monkeypatch):
    monkeypatch.setattr("fusedlm.ops.attention.sdpa.one_width", lambda *heads: heads)  # padding is no work of the model
    model = make()
    for block in model.blocks:
        block.mixer.computes_end_again = False  # nor is what is computed twice
    tokens = _tokens(batch=3, n=n_tokens)
    with FlopCounterMode(display=False, custom_mapping=SOLVE) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(tokens, tokens)
    recurrent = any(isinstance(block.mixer, LINEAR_TIME) for block in model.blocks)
    if n_tokens > 1 or not recurrent:  # a single token goes through the recurrent form, which has no matrix product
        assert counter.get_total_flops() == _forward_flops(model, 3, n_tokens)
    with FlopCounterMode(display=False, custom_mapping=SOLVE) as counter:
        loss.sum().backward()
    if not recurrent:  # the first state is a constant, so a recurrence has less to differentiate
        assert counter.get_total_flops() == 2 * _forward_flops(model, 3, n_tokens)
    assert training_flops_per_token(model, n_tokens) == 3 * forward_flops(model, n_tokens) / n_tokens


@ALL_MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_account_state(make, dtype):
    model = make().to(dtype)
    for n_tokens in (1, 4, N_TOKENS):
        tokens = _tokens(batch=3, n=n_tokens)
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
            model(_tokens(batch=1), state=state)
            sizes.append(state.nbytes())
    assert set(sizes) == {state_bytes(model, 1, torch.float32)} == {state_bytes(model, 10**9, torch.float32)}
