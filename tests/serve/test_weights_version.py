"""Changes of the weights are noticed."""

import torch
from torch import nn

from fusedlm.serve.requests import Sequence
from fusedlm.serve.weights_version import WeightsVersion
from tests.serve.engines import GREEDY, TOKENIZER, make_model


def test_writes_and_replaced_parameters_are_noticed():
    model = make_model()
    version = WeightsVersion(model)
    seen = [version()]
    assert version() == seen[0]
    with torch.no_grad():
        model.head.weight.add_(1)
    seen.append(version())
    model.head.weight = nn.Parameter(torch.ones_like(model.head.weight))
    seen.append(version())
    assert len(set(seen)) == 3


def test_replaced_modules_are_noticed_by_refresh():
    model = make_model()
    version = WeightsVersion(model)
    before = version()
    model.blocks[0].ffn = make_model().blocks[0].ffn
    assert version.refresh() != before


def test_random_numbers_are_those_that_are_drawn_one_at_a_time():
    generator = torch.Generator().manual_seed(7)
    sequence = Sequence(TOKENIZER, [1], GREEDY, max_tokens=1, seed=7)
    one_at_a_time = [torch.rand((), generator=generator, dtype=torch.float64).item() for _ in range(150)]
    assert [sequence.next_uniform() for _ in range(150)] == one_at_a_time
