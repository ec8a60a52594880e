"""Loading the model of a run: which checkpoint, which weights, what is refused."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from fusedlm.config import load_recipe
from fusedlm.data import open_prepared, prepare
from fusedlm.data.tokenizer import train_bpe
from fusedlm.evaluate import first_tokens, score_documents
from fusedlm.report import write_report
from fusedlm.runs import checkpoint as checkpoint_module
from fusedlm.runs.checkpoint import Checkpoints, RemovedCheckpoint
from fusedlm.runs.identity import read_identity
from fusedlm.runs.integrity import check_run
from fusedlm.runs.load import load
from fusedlm.runs.metrics import read_metrics
from fusedlm.runs.recipe import recipe_change, run_recipe
from fusedlm.runs.state import read_state
from fusedlm.train import train
from tests.runs.edits import edit_recipe, edit_state
from tests.train.runs import records, tiny_recipe


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "run")


def test_the_loaded_model_scores_as_the_trained_one(trained):
    recipe, run = trained
    for weights, key in (("raw", "val_bpb"), ("ema", "val_bpb_ema")):
        model, tokenizer, loaded = load(run, weights=weights, device="cpu")
        assert loaded == recipe and not model.training
        text = (run.parent / "text.txt").read_text().split("\n---\n")
        assert tokenizer.decode(tokenizer.encode(text[0])) == text[0]
        data = open_prepared(next((run.parent / "prepared").glob("text-*")))
        score = score_documents(
            model,
            first_tokens(data.validation.documents(), 100, tokenizer),
            window=16,
            stride=16,
            batch_tokens=32,
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
        ({"weights": "model"}, "weights='model': must be raw, ema or swa"),
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
    with pytest.raises(ValueError, match="has no ema weights; train with train.ema, or use weights raw"):
        load(copied, weights="ema")
    with pytest.raises(ValueError, match="has no swa weights; train with train.swa, or use weights raw"):
        load(copied, weights="swa")


def test_an_average_that_has_not_begun_is_refused(copied):
    edit_recipe(copied, lambda text: text.replace("swa: null", "swa: {every: 50, below: 0.2}"))
    with pytest.raises(ValueError, match="has no swa weights at step 12 yet; use weights raw, or a later checkpoint"):
        load(copied, weights="swa")


def test_a_checkpoint_of_another_model_is_refused(copied):
    edit_recipe(copied, lambda text: text.replace("hidden: 32", "hidden: 64"))
    with pytest.raises(
        ValueError, match=r"step-00000012: .* has shape \(32, 16\), in the model of the recipe \(64, 16\)"
    ):
        load(copied, device="cpu")
    assert Checkpoints(copied / "checkpoints").steps() == [8, 12]


def warnings(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def weights_of(run, **options) -> torch.Tensor:
    return load(run, device="cpu", **options)[0].embedding.weight


def test_an_intact_run_loads_without_a_warning(trained, caplog):
    for checkpoint in ("last", "best", 8):
        load(trained[1], checkpoint=checkpoint, device="cpu")
    assert warnings(caplog) == []


def test_the_recipe_is_that_of_the_checkpoint_and_a_change_of_the_copy_is_stated(trained, copied, caplog):
    path = copied / "recipe.yaml"
    original = path.read_text()
    path.write_text(original.replace("seq_len: 16", "seq_len: 18"))
    assert load(copied, device="cpu")[2] == trained[0]
    (warning,) = warnings(caplog)
    assert warning == (
        f"{path} is not the recipe of the checkpoint of step 12: train.seq_len is 18 there and 16 in the checkpoint, "
        "whose recipe is used"
    )
    path.write_text(original[: len(original) // 2])
    assert load(copied, device="cpu")[2] == trained[0]
    (warning,) = warnings(caplog)
    assert str(path) in warning and "the recipe of the checkpoint of step 12 is used" in warning
    path.write_text("# mine\n" + original)
    load(copied, device="cpu")
    assert warnings(caplog) == []


def test_flipped_bits_of_the_recipe_change_nothing_silently(trained, copied, caplog):
    """Every bit that changes a value is stated; the recipe is that of the checkpoint whatever the copy says."""
    path, recipe = copied / "recipe.yaml", trained[0]
    original = path.read_bytes()
    checkpoints, identity = Checkpoints(copied / "checkpoints"), read_identity(copied)
    state = read_state(checkpoints, 12)
    for position in range(0, len(original), 29):
        changed = bytearray(original)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        sentence = recipe_change(copied, identity, state, recipe)
        try:
            same = load_recipe(path) == recipe
        except ValueError:
            same = False
        assert (sentence is None) == same
    assert run_recipe(copied) == recipe


def test_a_tokenizer_of_another_run_is_refused(tmp_path, copied):
    other = train_bpe(["tea water stone a river old bridge and"] * 3, 257)
    other.save(copied)
    with pytest.raises(ValueError, match="run: its tokenizer is not the one that the run was trained with; restore it"):
        load(copied, device="cpu")


def test_a_checkpoint_of_another_run_is_named_and_the_one_before_it_is_used(copied, caplog):
    before = weights_of(copied, checkpoint=8)
    edit_state(copied, 12, run="e" * 32)
    assert torch.equal(weights_of(copied), before)
    (warning,) = warnings(caplog)
    path = copied / "checkpoints/step-00000012"
    assert warning.startswith(f"foreign checkpoint: {path} is of another run (eeeeeeeeeeee, this is ")
    assert warning.endswith("; using the one before it")
    with pytest.raises(ValueError, match="step-00000012 is of another run"):
        load(copied, checkpoint=12, device="cpu")


def test_a_checkpoint_under_the_name_of_another_step_is_refused(copied):
    shutil.copytree(copied / "checkpoints/step-00000008", copied / "checkpoints/step-00000010")
    with pytest.raises(ValueError, match="step-00000010 holds step 8; rename it to its step"):
        load(copied, checkpoint=10, device="cpu")
    assert torch.equal(weights_of(copied), weights_of(copied, checkpoint=12))


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_run_without_its_id_loads_with_a_warning(trained, copied, caplog, damage):
    if damage == "missing":
        (copied / "run.json").unlink()
    else:
        (copied / "run.json").write_text((copied / "run.json").read_text().replace("a", "b"))
    assert torch.equal(weights_of(copied), weights_of(trained[1]))
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{copied / 'run.json'}: ") and "fusedlm train --resume writes it again" in warning


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_errors_of_the_system_are_passed_on(copied, monkeypatch, caplog, number):
    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_module, "sha256_file", fail)
    with pytest.raises(OSError) as caught:
        load(copied, device="cpu")
    assert caught.value.errno == number
    assert caught.value.filename == str(copied / "checkpoints/step-00000012/model.safetensors")
    assert warnings(caplog) == []


@pytest.mark.parametrize("reader", ["files", "verify", "read_text", "read_tensors"])
@pytest.mark.parametrize("wanted", ["last", 12])
def test_a_checkpoint_that_is_removed_while_it_is_read(copied, monkeypatch, caplog, reader, wanted):
    """As a run that is training removes it, at each of the reads."""
    read = getattr(Checkpoints, reader)

    def remove_and_read(self, step, *arguments, **options):
        if self.path(12).exists():
            self.path(12).rename(copied / "checkpoints/step-00000012.tmp")
        return read(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, reader, remove_and_read)
    if wanted == "last":
        assert torch.equal(weights_of(copied), weights_of(copied, checkpoint=8))
        assert warnings(caplog) == []
    else:
        with pytest.raises(ValueError, match="has no checkpoint 12; it has last, best and 8"):
            load(copied, checkpoint=wanted, device="cpu")


def test_checkpoints_that_are_always_removed_are_one_line(copied, monkeypatch):
    def removed(self, step, stem):
        raise RemovedCheckpoint("removed")

    monkeypatch.setattr(Checkpoints, "read_tensors", removed)
    with pytest.raises(OSError, match="run removes its checkpoints faster than they can be read; try again"):
        load(copied, device="cpu")


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A run of the version without run.json and checks, as it was written, and its text."""
    shutil.copytree(Path(__file__).parent / "earlier", tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return Path("run")


def test_a_run_of_an_earlier_version_loads_scores_and_reports(earlier, caplog):
    found, damaged = read_metrics(earlier / "metrics.jsonl")
    last = found[-1]
    model, tokenizer, recipe = load(earlier, device="cpu")
    shards = prepare(recipe.data).validation
    score = score_documents(model, shards.documents(), window=8, stride=8, device="cpu", dtype=torch.float32)
    assert score.bpb == pytest.approx(last["val_bpb"], rel=1e-6) and damaged == []
    assert warnings(caplog) == [] and check_run(earlier) == []
    assert write_report(earlier).exists()


def test_a_changed_recipe_of_a_run_of_an_earlier_version_is_stated(earlier, caplog):
    path = earlier / "recipe.yaml"
    path.write_text(path.read_text().replace("seq_len: 8", "seq_len: 9"))
    assert load(earlier, device="cpu")[2].train.seq_len == 8
    assert "train.seq_len is 9 there and 8 in the checkpoint" in warnings(caplog)[0]
