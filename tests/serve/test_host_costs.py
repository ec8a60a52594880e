"""What the engine does on the host for each prompt and token: no more than it needs, and with the same results."""

import pytest
import torch

from fusedlm.nn.rope import YaRN
from fusedlm.serve import Choosing
from fusedlm.serve.prefix_cache import PrefixCache
from fusedlm.serve.weights import WeightsVersion
from tests.serve.engines import make_engine, make_model, make_sequence


def _write(model):
    with torch.no_grad():
        model.blocks[1].mixer.out.weight.add_(1)


def _replace_parameter(model):
    old = model.blocks[0].mixer.out
    old.weight = torch.nn.Parameter(old.weight.detach().clone())


def _replace_by_one_at_the_same_address(model):
    out = model.blocks[0].mixer.out
    address, version = out.weight.data_ptr(), out.weight._version
    out.weight = torch.nn.Parameter(out.weight.data)
    assert (out.weight.data_ptr(), out.weight._version) == (address, version)


def _replace_module(model):
    out = make_model("{type: attention, n_heads: 2}").blocks[0].mixer.out
    model.blocks[0].mixer.out = out


def _write_to_a_replaced_module(model):
    with torch.no_grad():
        model.blocks[0].mixer.out.weight.mul_(2)


def _add_a_module(model):
    model.blocks[0].mixer.out.adapter = torch.nn.Linear(2, 2)


def _stretch(model):
    model.set_yarn(YaRN(factor=4, trained_length=8))


CHANGES = [
    _write,
    _replace_parameter,
    _replace_by_one_at_the_same_address,
    _replace_module,
    _write_to_a_replaced_module,
    _add_a_module,
    _stretch,
]


def test_every_change_of_the_weights_is_noticed():
    model = make_model("{type: attention, n_heads: 2}")
    version = WeightsVersion(model)
    seen = [version()]
    for change in CHANGES:
        assert version() == seen[-1]
        change(model)
        assert version() not in seen, change.__name__
        seen.append(version())


def test_the_tree_of_modules_is_walked_once(monkeypatch):
    model = make_model()
    version = WeightsVersion(model)
    monkeypatch.setattr(type(model), "named_modules", lambda *_, **__: pytest.fail("walked again"))
    assert version() == version()


def test_a_cache_without_bytes_asks_for_no_version():
    calls = []
    cache = PrefixCache(0, 2, False, lambda: calls.append(1))
    calls.clear()
    cache.insert([1, 2], lambda first, last: pytest.fail("copied"), None)
    assert cache.find([1, 2, 3], 2).row is None and cache.misses == 1 and not calls


def test_random_numbers_are_those_of_one_draw_each():
    sequence, generator = make_sequence("a", seed=5), torch.Generator().manual_seed(5)
    for _ in range(150):
        assert sequence.next_uniform() == torch.rand((), generator=generator, dtype=torch.float64).item()


@pytest.mark.parametrize("choosing", [Choosing(temperature=0.0), Choosing(temperature=0.0, logprobs=0)])
def test_a_step_waits_for_the_device_once(choosing, monkeypatch):
    """For tokens and their log-probabilities together."""
    engine = make_engine(make_model("{type: attention, n_heads: 2}"))
    engine.submit([make_sequence(text, choosing) for text in ("a", "bc", "def")])
    engine.step()
    read, waits = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or read(tensor))
    pieces = engine.step()
    assert len(pieces) == 3 and len(waits) == 1
