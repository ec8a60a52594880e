"""Recipes that a CUDA graph cannot hold are refused before training. test_gpu.py tests what graphs compute."""

import contextlib

import pytest
import torch

from fusedlm.train import train
from fusedlm.train.micro_batch import forward_backward
from fusedlm.train.trainer import Trainer
from tests.train.runs import short_losses, tiny_recipe


def test_the_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runtime.cuda_graph=true: needs a CUDA device, not cpu; set runtime.cuda"):
        train(tiny_recipe(tmp_path, "runtime.cuda_graph=true"), tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.document_mask=true"], "set data.document_mask=false"),
        (["data.document_mask=false", "model.blocks.a.ffn={type: routed}"], "RoutedFFN waits for the device"),
    ],
)
def test_passes_that_wait_for_the_device_are_refused(tmp_path, overrides, message):
    assert torch.cuda.is_available()
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe(tmp_path, "runtime.device=cuda", "runtime.cuda_graph=true", *overrides), tmp_path / "run")


class _Passes:
    """In place of a captured graph: the plain passes, and the number of calls of each method."""

    def __init__(self, model):
        self.model, self.begun, self.called = model, 0, 0

    def begin_step(self):
        self.begun += 1
        self.model.zero_grad(set_to_none=False)

    def __call__(self, tokens, targets, loss_weight, batch_weight):
        self.called += 1
        weights = {"loss_weight": loss_weight, "batch_weight": batch_weight}
        return forward_backward(self.model, tokens, None, targets, autocast=contextlib.nullcontext, **weights)


def test_only_a_run_with_the_key_uses_a_graph(tmp_path, monkeypatch):
    made = []

    def capture(self):
        made.append(_Passes(self.model))
        return made[-1]

    monkeypatch.setattr(Trainer, "_capture", capture)
    (tmp_path / "plain").mkdir()
    common = ["data.document_mask=false", "model.dropout=0", "train.batch_size=4", "train.micro_batch_size=2"]
    plain = short_losses(tmp_path / "plain", *common)
    assert made == []
    assert short_losses(tmp_path, *common, "runtime.cuda_graph=true") == plain
    (passes,) = made
    assert (passes.begun, passes.called) == (2, 4), "the first of three steps allocates the optimizer state"
    assert all(p.grad is not None for p in passes.model.parameters()), "a graph writes its gradients in place"
