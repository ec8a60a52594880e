"""Full runs: metrics, validations, checkpoints, skipped steps, full disks, and what is refused."""

import io
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fusedlm.config import load_recipe
from fusedlm.model.accounting import training_flops_per_token
from fusedlm.report import write_report
from fusedlm.runs import load
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.metrics import MetricsFile, read_metrics
from fusedlm.runs.writer import CheckpointWriter
from fusedlm.train import TrainingDiverged, speed, train, trainer
from tests.train.runs import checkpoint_names, losses, records, tiny_recipe


def test_the_run_folder_holds_recipe_environment_and_metrics(trained):
    recipe, run = trained
    assert load_recipe(run / "recipe.yaml") == recipe
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["parameters"]["total"] == sum(p.numel() for p in load(run, device="cpu")[0].parameters())
    assert environment["backends"]["a.packed_attention"] == "sdpa"
    found, _ = read_metrics(run / "metrics.jsonl")
    steps = [record for record in found if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
        "loader_wait_seconds",
        "step_seconds",
    }
    assert [record["tokens"] for record in steps] == [step * 4 * 16 for step in range(1, 13)]
    assert steps[0]["mfu"] is None and steps[0]["peak_memory_bytes"] > 1e6
    assert [record["lr"] for record in steps[-3:]] == pytest.approx([0.01, 0.0055, 0.001])
    assert 0 <= steps[0]["loader_wait_seconds"] <= steps[0]["step_seconds"]
    validations = [record for record in found if "val_bpb" in record]
    assert [record["step"] for record in validations] == [4, 8, 12]
    assert set(validations[0]) == {
        "step",
        "val_bpb",
        "val_nll_per_token",
        "val_tokens",
        "val_bytes",
        "val_window",
        "val_stride",
        "tokens",
        "val_bpb_ema",
    }
    assert (validations[0]["val_window"], validations[0]["val_stride"]) == (16, 16)
    assert validations[0]["val_bytes"] == validations[0]["val_tokens"] >= 100
    assert validations[-1]["val_bpb"] < validations[0]["val_bpb"]
    assert losses(run)[-1] < losses(run)[0]


def test_every_key_is_documented(trained):
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    found, _ = read_metrics(trained[1] / "metrics.jsonl")
    environment = json.loads((trained[1] / "environment.json").read_text())
    assert [key for key in {*environment, *environment["parameters"]}.union(*found) if f"`{key}`" not in page] == []


def test_training_twice_gives_the_same_metrics(trained, tmp_path):
    recipe, run = trained
    result = train(recipe, tmp_path / "run")
    assert records(tmp_path / "run") == records(run)
    assert result.val_bpb == records(run)[-1]["val_bpb"]
    assert (result.step, result.run_dir, result.stopped_by_signal) == (12, tmp_path / "run", False)


def test_without_cadence_there_is_one_validation_and_one_checkpoint(tmp_path):
    recipe = tiny_recipe(tmp_path, "train.eval_every=0", "train.checkpoint_every=0", "train.steps=3", "train.ema=null")
    result = train(recipe, tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run") if "val_bpb" in record] == [3]
    assert checkpoint_names(tmp_path / "run") == ["step-00000003"]
    assert result.val_bpb is not None
    assert "ema.safetensors" not in Checkpoints(tmp_path / "run" / "checkpoints").files(3)


def test_micro_batches_give_the_losses_of_the_full_batch(tmp_path):
    common = ["train.steps=3", "model.dropout=0", "train.ema=null", "train.eval_every=0"]
    for name, size in (("full", "null"), ("parts", "1")):
        recipe = tiny_recipe(tmp_path, *common, f"train.micro_batch_size={size}")
        train(recipe, tmp_path / name)
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "parts"), rel=1e-5)


@pytest.mark.parametrize(
    "every, kept", [(1, ["step-00000002", "step-00000004", "step-00000005"]), (5, ["step-00000002", "step-00000005"])]
)
def test_the_best_checkpoint_is_kept_with_the_newest(tmp_path, monkeypatch, every, kept):
    """Also if no checkpoint was due at its step."""
    values = iter([3.0, 1.0, 2.0, 2.5, 4.0])

    class Score:
        nll_per_token, tokens, bytes, figures = 1.0, 1, 1, {}

        def __init__(self):
            self.bpb = next(values)

    monkeypatch.setattr(trainer, "score_documents", lambda *_, **__: Score())
    overrides = ["train.steps=5", "train.eval_every=1", f"train.checkpoint_every={every}", "train.ema=null"]
    train(tiny_recipe(tmp_path, *overrides), tmp_path / "run")
    assert checkpoint_names(tmp_path / "run") == kept
    state = Checkpoints(tmp_path / "run" / "checkpoints").read_json(5, "state.json")
    assert (state["best_step"], state["best_val_bpb"], state["val_bpb"]) == (2, 1.0, 4.0)


def break_steps(monkeypatch, broken):
    """Make the gradient of these steps (from 1) infinite; a list that fills with `next_sample` of each batch."""
    taken, train_step = [], trainer.train_step

    def broken_step(model, optimizer, batch, **options):
        taken.append(batch.next_sample)
        if len(taken) not in broken:
            return train_step(model, optimizer, batch, **options)
        with model.head.norm.weight.register_hook(lambda gradient: gradient * float("inf")):
            return train_step(model, optimizer, batch, **options)

    monkeypatch.setattr(trainer, "train_step", broken_step)
    return taken


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    taken = break_steps(monkeypatch, {2, 3, 6})
    recipe = tiny_recipe(tmp_path, "train.max_bad_steps=3")
    output = io.StringIO()
    train(recipe, tmp_path / "run", console=Console(file=output, width=200))
    assert taken == [4 * step for step in range(1, 13)]
    found = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in found if record.get("skipped")] == [2, 3, 6]
    assert found[1]["grad_norm"] is None
    assert [record["tokens"] for record in found] == [64 * step for step in range(1, 13)], "skipped batches were read"
    assert all("skipped" not in record for record in found if record["step"] not in (2, 3, 6))
    assert "step 6: loss or gradient norm is not finite; step skipped" in output.getvalue()
    state = Checkpoints(tmp_path / "run" / "checkpoints").read_json(12, "state.json")
    assert (state["skipped"], state["skipped_in_row"], state["ema_updates"]) == (3, 0, 9)


def test_a_loss_that_is_not_finite_is_recorded_and_reported(tmp_path, monkeypatch):
    """Of all heads and layers: none of their figures is a number that JSON has."""
    train_step = trainer.train_step

    def broken_step(model, optimizer, batch, **options):
        if batch.next_sample != 8:
            return train_step(model, optimizer, batch, **options)
        gain = model.blocks[0].mixer_norm.weight
        saved = gain.detach().clone()
        gain.data.fill_(float("nan"))
        result = train_step(model, optimizer, batch, **options)
        gain.data.copy_(saved)
        return result

    monkeypatch.setattr(trainer, "train_step", broken_step)
    ffn = "model.blocks.m.ffn={type: moe, n_experts: 4, top_k: 2, hidden: 16, sequence_loss: 0.1}"
    run = tmp_path / "run"
    train(tiny_recipe(tmp_path, ffn, "model.mtp={depth: 2}"), run)
    found = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in found if record.get("skipped")] == [2]
    assert found[1]["loss"] is None and found[1]["mtp_loss"] == [None, None]
    assert all(loss is not None for loss in found[2]["mtp_loss"])
    assert "NaN" not in write_report(run).read_text()


def test_too_many_skipped_steps_in_a_row_name_the_last_checkpoint(tmp_path, monkeypatch):
    break_steps(monkeypatch, {3, 5, 6, 7, 8})
    run = tmp_path / "run"
    with pytest.raises(
        TrainingDiverged,
        match="not finite in 3 steps in a row, up to step 7; the last checkpoint is .*step-00000004; lower",
    ):
        train(tiny_recipe(tmp_path, "train.max_bad_steps=3"), run)
    assert len(losses(run)) == 7
    assert checkpoint_names(run) == ["step-00000004"]
    assert issubclass(TrainingDiverged, ValueError)


def test_skipped_steps_are_counted_across_a_resume(tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipe = tiny_recipe(tmp_path, "train.max_bad_steps=3")
    break_steps(monkeypatch, {3, 4, 5})
    for _ in range(2):
        with pytest.raises(TrainingDiverged, match="up to step 5"):
            train(recipe, run, resume=True)
        monkeypatch.undo()
        break_steps(monkeypatch, {1})


def test_a_run_stopped_by_a_full_disk_resumes(trained, tmp_path):
    recipe, straight = trained
    run = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the metrics, not for the model.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint .*step-00000004 could not be written: ") as caught:
            train(recipe, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert checkpoint_names(run) == []
    train(recipe, run, resume=True)
    assert records(run) == records(straight)


def test_metrics_that_cannot_be_written_are_named(trained, tmp_path):
    recipe = tiny_recipe(trained[1].parent, "train.checkpoint_every=0", "train.eval_every=0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(OSError, match="metrics.jsonl could not be written: File too large"):
            train(recipe, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_missing_logger_is_refused_before_the_folder_is_created(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb.*: package wandb is not installed; pip install wandb"):
        train(tiny_recipe(tmp_path, "train.loggers=[wandb]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_global_switches_are_restored(tmp_path):
    recipe = tiny_recipe(tmp_path, "runtime.deterministic=true", "train.steps=2", "train.eval_every=0")
    train(recipe, tmp_path / "run")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_seed_alone_determines_a_run(tmp_path):
    common = ["train.steps=1", "train.eval_every=0", "train.ema=null"]
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.rand(7)
        train(tiny_recipe(tmp_path, *common, f"train.seed={seed}"), tmp_path / name)
    assert losses(tmp_path / "one") == losses(tmp_path / "two") != losses(tmp_path / "other")


def test_out_of_memory_names_the_keys_that_lower_it(tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, "train_step", exhausted)
    with pytest.raises(
        ValueError, match="train.micro_batch_size=2: the GPU is out of memory with 2 x 16 tokens; lower train.micro"
    ):
        train(tiny_recipe(tmp_path), tmp_path / "run")


def test_mfu_is_the_fraction_of_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "peak_flops", lambda device: 1e12)
    train(tiny_recipe(tmp_path, "train.steps=2", "train.eval_every=0"), tmp_path / "run")
    flops = training_flops_per_token(load(tmp_path / "run", device="cpu")[0], 16)
    records, _ = read_metrics(tmp_path / "run/metrics.jsonl")
    for record in (record for record in records if "loss" in record):
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / 1e12)
        assert record["tokens_per_second"] == pytest.approx(64 / record["step_seconds"])


def test_metrics_are_synced_before_a_checkpoint_is_renamed(tmp_path, monkeypatch):
    """After a crash, no checkpoint is ahead of the records."""
    path = tmp_path / "run/metrics.jsonl"
    fsync, rename = os.fsync, os.rename
    synced, renamed = [b""], []

    def spy_fsync(descriptor):
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            synced.append(path.read_bytes())
        fsync(descriptor)

    def spy_rename(source, target):
        if target.name.startswith("step-") and source.name.endswith(".tmp"):
            step = int(target.name[5:])  # later records may be there, while the checkpoint is written
            records = [line for line in path.read_bytes().splitlines() if json.loads(line)["step"] <= step]
            renamed.append((target.name, len(records) >= step and set(records) <= set(synced[-1].splitlines())))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    train(tiny_recipe(tmp_path, "train.steps=4", "train.checkpoint_every=1", "train.eval_every=2"), tmp_path / "run")
    assert renamed == [(f"step-{step:08d}", True) for step in (1, 2, 3, 4)]


def test_records_of_a_step_are_written_before_its_checkpoint(tmp_path, monkeypatch):
    """Validation included: a resumed run does not repeat it."""
    order, write, begin = [], MetricsFile.write, CheckpointWriter.begin

    def spy_write(self, record):
        order.append(("validation" if "val_bpb" in record else "step", record["step"]))
        write(self, record)

    def spy_begin(self, step, *arguments, **options):
        order.append(("checkpoint", step))
        return begin(self, step, *arguments, **options)

    monkeypatch.setattr(MetricsFile, "write", spy_write)
    monkeypatch.setattr(CheckpointWriter, "begin", spy_begin)
    train(tiny_recipe(tmp_path, "train.steps=2", "train.eval_every=1", "train.checkpoint_every=1"), tmp_path / "run")
    expected = [(kind, step) for step in (1, 2) for kind in ("step", "validation", "checkpoint")]
    assert order == expected
