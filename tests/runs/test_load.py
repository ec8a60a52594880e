"""Loading the model of a run: which checkpoint, which weights, what is refused."""

import shutil

import pytest
import torch

from fusedlm.data import open_prepared
from fusedlm.evaluate import score_documents
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.load import load
from fusedlm.train import train
from tests.runs.edits import edit_recipe
from tests.train.runs import records, tiny_recipe


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "run")


def test_the_loaded_model_scores_as_the_trained_one(trained):
    recipe, run = trained
    for weights, key in (("model", "val_bpb"), ("ema", "val_bpb_ema")):
        model, tokenizer, loaded = load(run, weights=weights, device="cpu")
        assert loaded == recipe and not model.training
        text = (run.parent / "text.txt").read_text().split("\n---\n")
        assert tokenizer.decode(tokenizer.encode(text[0])) == text[0]
        data = open_prepared(next((run.parent / "prepared").glob("text-*")))
        score = score_documents(
            model,
            data.validation.documents(),
            window=16,
            stride=16,
            batch_tokens=32,
            max_tokens=100,
            device="cpu",
            dtype=torch.float32,
        )
        assert score.bpb == records(run)[-1][key]


def test_it_needs_nothing_outside_the_run_folder(tmp_path):
    run = tmp_path / "run"
    recipe = tiny_recipe(tmp_path, "train.steps=2", "train.eval_every=0", "data.tokenizer={type: bpe, vocab_size: 270}")
    train(recipe, run)
    shutil.rmtree(tmp_path / "prepared")
    (tmp_path / "text.txt").unlink()
    moved = run.rename(tmp_path / "moved")
    model, tokenizer, _ = load(moved, device="cpu")
    assert model.vocab_size == tokenizer.vocab_size <= 270


def test_the_recipe_has_the_overrides(trained):
    recipe, run = trained
    _, _, loaded = load(run, device="cpu", overrides=["runtime.dtype=bfloat16"])
    assert loaded.runtime.dtype == "bfloat16"
    assert loaded.model_copy(update={"runtime": recipe.runtime}) == recipe


def test_checkpoints_are_chosen_by_name_or_step(trained, copied):
    by_step, _, _ = load(copied, checkpoint=8, device="cpu")
    last, _, _ = load(copied, device="cpu")
    best, _, _ = load(copied, checkpoint="best", device="cpu")
    weights = [model.embedding.weight for model in (by_step, last, best)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_loading_draws_no_random_numbers(trained):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(trained[1], device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_is_used(copied, caplog):
    path = copied / "checkpoints/step-00000012/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    model, _, _ = load(copied, device="cpu")
    assert f"damaged checkpoint: {path}" in caplog.text
    assert torch.equal(model.embedding.weight, load(copied, checkpoint=8, device="cpu")[0].embedding.weight)
    with pytest.raises(ValueError, match="step-00000012/model.safetensors"):
        load(copied, checkpoint=12, device="cpu")
    shutil.rmtree(copied / "checkpoints/step-00000008")
    with pytest.raises(ValueError, match="has no intact checkpoint"):
        load(copied, device="cpu")


def test_there_is_no_best_checkpoint_before_a_validation(tmp_path):
    recipe = tiny_recipe(tmp_path, "train.max_bad_steps=1", "train.checkpoint_every=1", "train.optimizer.lr=1e30")
    with pytest.raises(ValueError, match="not finite"):
        train(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="has no validated checkpoint yet; use checkpoint last"):
        load(tmp_path / "run", checkpoint="best", device="cpu")


def test_damaged_optimizer_state_does_not_prevent_loading(copied):
    (copied / "checkpoints/step-00000012/optimizer.safetensors").write_bytes(b"")
    load(copied, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": 9}, "has no checkpoint 9; it has last, best and 8, 12"),
        ({"checkpoint": "newest"}, "has no checkpoint 'newest'"),
        ({"weights": "swa"}, "weights='swa': must be model or ema"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"overrides": ["train.steps=1"]}, "'train.steps=1': only keys of section runtime can be changed"),
        ({"overrides": ["runtime.dtype=float16"]}, "runtime.dtype: got 'float16'"),
        ({"overrides": ["runtime.device=cpu"]}, "'runtime.device=cpu': choose the device .* with --device"),
        ({"overrides": ["runtime.compile=true"]}, "runtime.compile is for training"),
    ],
)
def test_invalid_arguments_are_named(trained, options, message):
    with pytest.raises(ValueError, match=message):
        load(trained[1], **options)


def test_folders_without_a_run_are_named(copied, tmp_path):
    with pytest.raises(ValueError, match="absent holds no run; train one with"):
        load(tmp_path / "absent")
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load(copied)


def test_averaged_weights_of_a_run_without_them_are_refused(copied):
    edit_recipe(copied, lambda text: text.replace("ema: 0.9", "ema: null"))
    with pytest.raises(ValueError, match="has no averaged weights"):
        load(copied, weights="ema")


def test_a_checkpoint_of_another_model_is_refused(copied):
    edit_recipe(copied, lambda text: text.replace("hidden: 32", "hidden: 64"))
    with pytest.raises(
        ValueError, match=r"step-00000012: .* has shape \(32, 16\), in the model of the recipe \(64, 16\)"
    ):
        load(copied, device="cpu")
    assert Checkpoints(copied / "checkpoints").steps() == [8, 12]
