"""What a CUDA graph cannot hold is refused before training; what it computes is tested on a GPU in test_gpu.py."""

import pytest
import torch

from fusedlm.train import train
from tests.train.runs import tiny_recipe


def test_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="train.cuda_graph=true needs a CUDA device, not cpu"):
        train(tiny_recipe(tmp_path, "train.cuda_graph=true"), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.document_mask=true"], "set data.document_mask=false"),
        (["data.document_mask=false", "model.blocks.a.ffn={type: routed}"], "does not go with routed"),
    ],
)
def test_passes_that_wait_for_the_device(tmp_path, overrides, message):
    assert torch.cuda.is_available()
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe(tmp_path, "train.device=cuda", "train.cuda_graph=true", *overrides), tmp_path / "run")
