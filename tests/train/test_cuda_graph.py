"""What a CUDA graph cannot hold is refused before training; what it computes is tested on a GPU in test_gpu.py."""

import pytest
import torch

from fusedlm.train import train
from fusedlm.train.trainer import Trainer
from tests.train.runs import short_losses, tiny_recipe


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


class _Passes:
    """Stands for a captured graph: the plain passes, and how often each method was called."""

    def __init__(self, model):
        self.model, self.begun, self.called = model, 0, 0

    def begin_step(self):
        self.begun += 1
        self.model.zero_grad(set_to_none=False)

    def __call__(self, tokens, targets, n_valid):
        self.called += 1
        loss = self.model.loss(tokens, targets).sum() / n_valid
        loss.backward()
        return loss.detach()


def test_a_run_with_the_key_goes_through_the_graph_and_one_without_does_not(tmp_path, monkeypatch):
    made = []

    def capture(self):
        made.append(_Passes(self.model))
        return made[-1]

    monkeypatch.setattr(Trainer, "_capture", capture)
    (tmp_path / "plain").mkdir()
    common = ["data.document_mask=false", "model.dropout=0", "train.batch_size=4", "train.micro_batch_size=2"]
    plain = short_losses(tmp_path / "plain", *common)
    assert made == []
    assert short_losses(tmp_path, *common, "train.cuda_graph=true") == plain
    (passes,) = made
    assert (passes.begun, passes.called) == (2, 4), "the first of three steps makes the optimizer's moments"
    assert all(p.grad is not None for p in passes.model.parameters()), "a graph writes its gradients in place"
