"""The memory of the sequences that are decoded together."""

import pytest
import torch

from fusedlm.model.rows import take_row
from fusedlm.serve.slots import Slots
from fusedlm.testing import MIXER_CASES
from tests.serve.engines import make_model


def row_of(model, n: int):
    state = model.init_state(1)
    with torch.no_grad():
        model(torch.arange(n)[None], state=state)
    return take_row(state, 0)


@pytest.mark.parametrize("mixer", [case for cases in MIXER_CASES.values() for case in cases])
def test_all_rows_are_allocated_at_once_where_they_fit(mixer):
    model = make_model(mixer)
    slots = Slots(model, 5, 200, at_once=lambda: 10**9)
    for n in (3, 70, 200):
        slots.append(row_of(model, n))
        assert (slots.n_rows, slots.capacity, slots.generation) == (5, 202, 1)
    needed = slots.nbytes()
    exact = Slots(model, 5, 200, at_once=lambda: needed)
    exact.append(row_of(model, 3))
    assert exact.nbytes() == needed and exact.generation == 1


def test_rows_that_do_not_fit_at_once_grow():
    model = make_model("{type: attention, n_heads: 2}")
    full = Slots(model, 5, 200, at_once=lambda: 10**9)
    full.append(row_of(model, 3))
    for at_once in (None, lambda: full.nbytes() - 1):
        slots = Slots(model, 5, 200, at_once=at_once)
        slots.append(row_of(model, 3))
        assert (slots.n_rows, slots.capacity) == (1, 64)
        slots.append(row_of(model, 70))
        assert (slots.n_rows, slots.capacity, slots.generation) == (2, 128, 2)
