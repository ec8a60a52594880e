import pytest

from benchmarks.recall import ATTENTION_HIDDEN, BLOCKS, PATTERNS, equal_hidden, model_config
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.nn.mixers import MIXERS


def test_every_mixer_is_in_the_table():
    assert set(BLOCKS) == set(MIXERS)


@pytest.mark.parametrize("name", PATTERNS)
def test_parameters_are_about_equal(name):
    def parameters(name, hidden):
        return count_parameters(build_model(model_config(name, hidden), vocab_size=192, device="meta")).total

    wanted = parameters("attention", ATTENTION_HIDDEN)
    assert parameters(name, equal_hidden(name, 192)) == pytest.approx(wanted, rel=0.005)
