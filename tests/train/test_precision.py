"""The dtype of the recipe is that of activations in training, validation and the sample after it."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from fusedlm.cli import main
from fusedlm.config import dump_recipe
from fusedlm.data import open_prepared
from fusedlm.evaluate import first_tokens, score_documents
from fusedlm.nn.block import Block
from fusedlm.runs import load
from fusedlm.train import train, trainer
from tests.train.runs import SHORT, records, tiny_recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_have_the_dtype_of_the_recipe(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    recipe = tiny_recipe(tmp_path, *SHORT, f"runtime.dtype={name}")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    seen = set()

    def note(module, inputs, output):
        if isinstance(module, Block):
            phase = "training" if module.training else "validation" if inputs[2] is None else "sample"
            seen.add((phase, output[0].dtype))

    handle = register_module_forward_hook(note)
    try:
        assert main(["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    finally:
        handle.remove()
    assert seen == {("training", dtype), ("validation", dtype), ("sample", dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_on_a_gpu_have_the_dtype_of_the_recipe(tmp_path, dtype, monkeypatch):
    """On a CPU they have that of the parameters, so the optimizer is asked what it would do."""
    built, build = [], trainer.build_optimizer
    monkeypatch.setattr(trainer, "build_optimizer", lambda *given: built.append(build(*given)) or built[-1])
    name = str(dtype).removeprefix("torch.")
    overrides = [*SHORT, f"runtime.dtype={name}", "train.optimizer={type: muon_adamw}"]
    train(tiny_recipe(tmp_path, *overrides), tmp_path / "run")
    assert [optimizer.update_dtype for optimizer in built] == [dtype]


def test_validation_is_scored_in_the_dtype_of_training(tmp_path):
    train(tiny_recipe(tmp_path, "train.steps=4", "train.ema=null", "runtime.dtype=bfloat16"), tmp_path / "run")
    model, _, _ = load(tmp_path / "run", device="cpu")
    data = open_prepared(next((tmp_path / "prepared").glob("text-*")))
    documents = list(first_tokens(data.validation.documents(), 100, data.tokenizer))
    options = {"window": 16, "stride": 16, "batch_tokens": 32, "device": "cpu"}
    dtypes = (torch.float32, torch.bfloat16)
    bpb = {dtype: score_documents(model, documents, dtype=dtype, **options).bpb for dtype in dtypes}
    (validation,) = [record for record in records(tmp_path / "run") if "val_bpb" in record]
    assert validation["val_bpb"] == bpb[torch.bfloat16] != bpb[torch.float32]
