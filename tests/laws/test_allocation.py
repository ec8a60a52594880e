"""Constructors allocate, `init_weights` draws: a model on the meta device gets its values later, bit for bit."""

import copy
import re
import subprocess
import sys

import pytest
import torch

from fusedlm import build_model, load_recipe
from fusedlm.model import Decoder
from fusedlm.nn.module import init_weights
from fusedlm.testing import randomise_
from tests.laws.models import ALL_MODELS, RECIPES, VOCAB, one_period, some_tokens


def _same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    tokens = some_tokens(2, 20)
    assert torch.equal(one.eval()(tokens).logits, other.eval()(tokens).logits)


def _poisoned(make):
    """What `make` gives, allocated in memory full of NaN."""
    empty_like = torch.empty_like
    torch.empty_like = lambda x, **options: empty_like(x, **options).fill_(float("nan"))
    try:
        return make()
    finally:
        torch.empty_like = empty_like


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_from_the_meta_device_through_loading(recipe):
    config = one_period(load_recipe(recipe))
    model = randomise_(build_model(config, vocab_size=VOCAB))
    again = _poisoned(lambda: build_model(config, vocab_size=VOCAB, device="meta").to_empty(device="cpu"))
    assert all(tensor.isnan().all() for tensor in again.state_dict().values())
    again.load_state_dict(model.state_dict())
    _same(again, model)


@ALL_MODELS
def test_from_the_meta_device_through_drawing(make):
    """In a model that had other values before."""
    one, other = make(), randomise_(make())
    for model in (one, other):
        init_weights(model, seed=7)
    _same(one, other)
    init_weights(other, seed=8)
    changed = {name for name, p in one.named_parameters() if not torch.equal(p, dict(other.named_parameters())[name])}
    assert "embedding.weight" in changed


@ALL_MODELS
def test_nothing_that_counts_is_left_out_of_the_saved_state(make):
    """A buffer that is not saved would come back from the meta device as garbage."""
    model = make()
    saved = set(model.state_dict())
    assert {name for name, _ in model.named_buffers()} <= saved
    assert {name for name, _ in model.named_parameters()} <= saved


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied(tied):
    config = one_period(load_recipe(RECIPES[0])).model_copy(update={"tie_embeddings": tied})
    for model in (
        build_model(config, vocab_size=VOCAB),
        build_model(config, vocab_size=VOCAB, device="meta").to_empty(device="cpu"),
        build_model(config, vocab_size=VOCAB).to(torch.bfloat16),
        copy.deepcopy(build_model(config, vocab_size=VOCAB)),
    ):
        assert (model.head.weight is model.embedding.weight) == tied
        assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_a_parameter_does_not_depend_on_the_others():
    """A deeper model starts with the weights of the shallow one."""
    config = one_period(load_recipe(RECIPES[0]))
    shallow = build_model(config, vocab_size=VOCAB, seed=3)
    deep = build_model(config.model_copy(update={"n_layers": config.n_layers + 1}), vocab_size=VOCAB, seed=3)
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, dict(deep.named_parameters())[name]), name
    other = build_model(config, vocab_size=VOCAB, seed=4)
    assert not torch.equal(other.embedding.weight, shallow.embedding.weight)


def test_the_global_seed_decides_where_none_is_given():
    config, weights = one_period(load_recipe(RECIPES[0])), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(build_model(config, vocab_size=VOCAB).embedding.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_layers_of_one_kind_start_differently():
    config = one_period(load_recipe(RECIPES[0])).model_copy(update={"n_layers": 3, "pattern": "g"})
    first, second, _ = build_model(config, vocab_size=VOCAB, seed=0).blocks
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if one.std() > 0:
            assert not torch.equal(one, other), name


def test_nn_and_model_need_neither_pydantic_nor_yaml():
    """A decoder is made of plain keyword arguments."""
    script = """
import sys
sys.modules["pydantic"] = sys.modules["yaml"] = None
import torch
from fusedlm.model import Decoder
from fusedlm.nn.module import init_weights
blocks = {
    "g": {"mixer": {"type": "gdn", "n_heads": 2}, "ffn": {"type": "relu2"}},
    "c": {"mixer": {"type": "cmd_mla", "n_heads": 2, "kv_rank": 8}, "ffn": {"type": "routed", "hidden": 32}},
}
yarn = {"factor": 2.0, "trained_length": 8}
model = Decoder(vocab_size=61, dim=32, n_layers=2, pattern="gc", blocks=blocks, yarn=yarn)
init_weights(model, 0)
print(model(torch.arange(5)[None]).logits.shape)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "torch.Size([1, 5, 61])\n", found.stderr


def test_a_recipe_is_the_same_model_as_its_plain_values():
    config = one_period(load_recipe(RECIPES[0]))
    # A model under muP is made from two, one of them at base width; `build_model` does that.
    plain = Decoder(vocab_size=VOCAB, **config.model_dump(exclude={"mup"}))
    init_weights(plain, 5)
    _same(plain, build_model(config, vocab_size=VOCAB, seed=5))


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match=re.escape("missing 1 required keyword-only argument: 'n_heads'")):
        Decoder(
            vocab_size=61,
            dim=32,
            n_layers=1,
            pattern="a",
            blocks={"a": {"mixer": {"type": "attention"}, "ffn": {"type": "swiglu"}}},
        )
