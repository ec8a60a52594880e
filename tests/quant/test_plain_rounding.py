"""Integer codes by rounding each weight by itself."""

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.quant.artifact.contents import contents
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.quant.plain_rounding import Rounding, round_matrix, round_model
from tests.quant.artifacts import RECIPE, pack_small


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 5, 7])
def test_codes_are_the_nearest(bits, group):
    weight = torch.randn(6, 33, generator=torch.Generator().manual_seed(bits)) * 0.02
    found = round_matrix(weight, Rounding(bits, None, group))
    largest = 2 ** (bits - 1) - 1
    assert found.codes.dtype == torch.int8 and found.codes.abs().max() == largest
    assert found.scales.shape == (6, 1 if group is None else -(-33 // group)) and found.scales.dtype == torch.bfloat16
    every = found.scales.double().repeat_interleave(group or 33, dim=1)[:, :33]
    # The largest of a row can be beyond the last code by the rounding of the scale to 8 bits.
    assert ((weight.double() - found.codes * every).abs() <= every * (0.5 + largest / 256)).all()
    inside = found.codes.abs() < largest
    assert ((weight.double() - found.codes * every).abs() <= every * 0.500001)[inside].all()


def test_deviations_set_the_reach():
    weight = torch.randn(8, 4000, generator=torch.Generator().manual_seed(0))
    found = round_matrix(weight, Rounding(6, 12.85))
    expected = 12.85 * weight.std(1, correction=0) / 31
    torch.testing.assert_close(found.scales[:, 0].float(), expected, rtol=2**-8, atol=0)  # bfloat16
    assert 2.3 < found.codes.float().std() < 2.5
    narrow = round_matrix(weight, Rounding(4, 1.0))
    assert (narrow.codes == 7).any() and (narrow.codes == -7).any()  # clamped


def test_scales_have_no_floor_and_rows_may_be_constant():
    weight = torch.stack([torch.full((4,), 3e-30), torch.zeros(4), torch.tensor([1.0, 1, 1, 1.0])])
    for deviations in (None, 12.85):
        found = round_matrix(weight, Rounding(6, deviations))
        torch.testing.assert_close(found.values(), weight, rtol=0.01, atol=0)


def test_matrices_and_tables_of_a_model_are_rounded():
    model = build_model(RECIPE.model, vocab_size=257, device="cpu", seed=0)
    found = round_model(model, Rounding(4), Rounding(8, group=8))
    assert found["embedding.weight"].bits == 8 and found["embedding.weight"].group == 8
    matrices = found.keys() - {"embedding.weight"}
    assert matrices and all(found[name].bits == 4 and name.startswith("blocks.0.") for name in matrices)
    tensors = contents(model, found, torch.bfloat16)
    assert tensors.keys() == model.state_dict().keys() - {"head.weight"}  # tied
    for name, tensor in tensors.items():
        assert isinstance(tensor, IntegerMatrix) == (name in found)
        assert isinstance(tensor, IntegerMatrix) or tensor.dtype == torch.bfloat16


@pytest.mark.gpu
def test_what_is_on_a_gpu_is_packed_from_the_cpu():
    model = build_model(RECIPE.model, vocab_size=257, device="cuda", seed=0)
    found = round_model(model, Rounding(4), Rounding(8))
    assert all(matrix.codes.is_cuda for matrix in found.values())
    tensors = contents(model, found, torch.bfloat16)
    pack_small(tensors)
    for name, matrix in found.items():
        assert torch.equal(tensors[name].codes, matrix.codes.cpu())
        assert torch.equal(tensors[name].scales, matrix.scales.cpu())


def test_what_cannot_be_rounded_is_named():
    model = build_model(RECIPE.model, vocab_size=257, device="cpu", seed=0)
    with pytest.raises(ValueError, match="matrix 'other' is no parameter of the model"):
        contents(model, {"other": None}, torch.float16)
    with torch.no_grad():
        model.blocks[0].mixer_norm.weight[0] = 1e6
    with pytest.raises(ValueError, match="blocks.0.mixer_norm.weight: has elements too large for torch.float16"):
        contents(model, {}, torch.float16)
    with torch.no_grad():
        model.embedding.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="embedding.weight: has NaN or infinity; pack an earlier checkpoint"):
        round_model(model, Rounding(4), Rounding(8))
    wrong = {(1,): "bits=1", (4, -1.0): "deviations=-1", (4, float("nan")): "deviations=nan", (4, 1.0, 0): "group=0"}
    for arguments, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            Rounding(*arguments)
