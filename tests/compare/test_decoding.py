"""Decoding is measured on the live state."""

import pytest
import torch

from fusedlm.compare.decoding import measure_decoding
from fusedlm.model.accounting import state_bytes
from fusedlm.testing import part_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("mixer", ["{type: attention, n_heads: 2}", "{type: mla, n_heads: 2, kv_rank: 8}"])
def test_softmax_states_grow_with_length(mixer):
    model = part_model(mixer)
    found = measure_decoding(model, [10, 100, 1000], CPU, torch.float32)
    assert {length: size for length, (size, _) in found.items()} == {
        length: state_bytes(model, length, torch.float32) for length in (10, 100, 1000)
    }
    assert found[1000][0] == 100 * found[10][0]


def test_recurrent_states_do_not_grow():
    model = part_model("{type: gdn, n_heads: 2, chunk_size: 8}")
    found = measure_decoding(model, [10, 100_000], CPU, torch.float32)
    assert found[10][0] == found[100_000][0] == state_bytes(model, 1, torch.float32)
    assert all(rate > 0 for _, rate in found.values())


def test_the_model_keeps_its_mode():
    model = part_model("{type: attention, n_heads: 2}").train()
    measure_decoding(model, [4], CPU, torch.float32)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_lengths_out_of_memory_are_none(monkeypatch):
    model = part_model("{type: attention, n_heads: 2}")
    extend = type(model.init_state(1)).extend_to

    def limited(state, n_tokens):
        if n_tokens > 50:
            raise torch.OutOfMemoryError
        extend(state, n_tokens)

    monkeypatch.setattr(type(model.init_state(1)), "extend_to", limited)
    found = measure_decoding(model, [20, 60], CPU, torch.float32)
    assert found[20] is not None and found[60] is None
