"""Steps that fill an artifact: each file is made of the weights as they were, and the limit is kept."""

import copy

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.quant.artifact.budget import OverBudget
from fusedlm.quant.artifact.contents import contents
from fusedlm.quant.calibration import Calibration, CalibrationBatch
from fusedlm.quant.fit import fit_artifact
from fusedlm.quant.request import Request
from fusedlm.quant.sequence import quantize_in_order
from fusedlm.testing import randomise_, wired_config
from tests.quant.artifacts import pack_small


@pytest.fixture(scope="module")
def problem():
    """(model, calibration of a model, estimates, build of a model)."""
    model = randomise_(build_model(wired_config("avg"), vocab_size=61, seed=0)).eval()
    batches = [CalibrationBatch(torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(0)), None)]

    def calibration(of):
        return Calibration(of, batches, torch.device("cpu"), torch.float32)

    def build(of):
        return lambda matrices: pack_small(contents(of, matrices, torch.float16), coders=("raw", "lzma"))

    estimates = Request("coded", calibrate="gptq", budget=1).coded_estimates(model, calibration(model))
    return model, calibration, estimates, build


def _fit(problem, limit, **options):
    model, calibration, estimates, build = problem
    model = copy.deepcopy(model)
    return fit_artifact(model, estimates, calibration(model), build(model), limit, others=0, **options)


def test_the_file_fills_the_limit_with_codes_of_the_weights_as_they_were(problem):
    fitted = _fit(problem, 18000)
    size = len(fitted.packed.content)
    assert 1 < len(fitted.sizes) <= 4 and size in fitted.sizes
    assert 0.985 * 18000 < size == max(n for n in fitted.sizes if n <= 18000)
    model, calibration, _, _ = problem
    model = copy.deepcopy(model)
    expected = quantize_in_order(model, fitted.choices, calibration(model))
    assert all(torch.equal(fitted.outcomes[name].matrix.codes, own.matrix.codes) for name, own in expected.items())
    assert len({choice.method.clip for choice in fitted.choices.values()}) > 3


def test_what_counts_beside_the_file_counts(problem):
    fitted = _fit(problem, 18000, code=lambda packed: 3000)
    assert 0.97 * 18000 < len(fitted.packed.content) + 3000 <= 18000
    assert len(fitted.packed.content) + 3000 in fitted.sizes


def test_a_limit_that_all_steps_keep_gets_the_finest(problem):
    fitted = _fit(problem, 10**6)
    assert {choice.method.clip for choice in fitted.choices.values()} == {127 / 16} and len(fitted.sizes) == 1


def test_a_limit_that_none_keeps_names_the_bytes_of_each_tensor(problem):
    with pytest.raises(OverBudget, match="more than --bytes 9000") as caught:
        _fit(problem, 9000)
    rows = {row.name: row for row in caught.value.breakdown.rows}
    assert rows.keys() >= problem[2].keys() and sum(row.bytes for row in rows.values()) > 9000
