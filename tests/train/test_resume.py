"""A run that was stopped anywhere and resumed is an uninterrupted run, bit for bit."""

import json
import os
import random
import shutil
import signal

import pytest

from fusedlm.config import dump_recipe, load_recipe
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.integrity import check_run
from fusedlm.train import train, trainer
from tests.optim.test_optimizer import Odd
from tests.runs.edits import edit_header
from tests.train.children import training_child, wait_for
from tests.train.runs import assert_same_run, checkpoint_names, losses, records, resume, snapshot, tiny_recipe


def test_a_run_killed_at_random_steps_and_in_checkpoints_resumes_bit_for_bit(trained, tmp_path):
    recipe, straight = trained
    run = tmp_path / "run"
    for step in sorted(random.Random(7).sample(range(1, 9), 4)):
        with training_child(recipe, run) as (process, connection):
            wait_for(connection, "step", at_least=step)
            process.kill()
            process.join()
    for held in (8, 12):
        if held in Checkpoints(run / "checkpoints").steps():
            continue
        with training_child(recipe, run, hold_in_save_at=held) as (process, connection):
            wait_for(connection, "saving")
            process.kill()
            process.join()
        assert f".fusedlm-step-{held:08d}.tmp" in checkpoint_names(run)
    train(recipe, run, resume=True)
    assert_same_run(run, straight)
    assert checkpoint_names(run) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(trained, tmp_path, number):
    recipe, straight = trained
    run = tmp_path / "run"
    with training_child(recipe, run) as (process, connection):
        wait_for(connection, "step", at_least=2)
        os.kill(process.pid, number)
        result = wait_for(connection, "result")
        process.join()
        assert process.exitcode == 0
    assert result.stopped_by_signal
    assert 2 <= result.step <= 12
    assert Checkpoints(run / "checkpoints").steps()[-1] == result.step
    assert not train(recipe, run, resume=True).stopped_by_signal
    assert_same_run(run, straight)


def test_a_second_signal_kills(trained, tmp_path):
    recipe, _ = trained
    with training_child(recipe, tmp_path / "run", hold_in_save_at=4) as (process, connection):
        wait_for(connection, "saving")
        process.terminate()
        wait_for(connection, "handlers restored")
        process.terminate()
        process.join()
        assert process.exitcode == -signal.SIGTERM


def test_a_validation_that_a_signal_interrupted_is_repeated_on_resume(trained, tmp_path, monkeypatch):
    recipe, straight = trained
    run = tmp_path / "run"
    score_documents = trainer.score_documents

    def score(model, documents, **options):
        if losses(run)[11:]:
            signal.raise_signal(signal.SIGTERM)
        return score_documents(model, documents, **options)

    monkeypatch.setattr(trainer, "score_documents", score)
    result = train(recipe, run)
    assert (result.step, result.stopped_by_signal) == (12, True)
    assert [record["step"] for record in records(run) if "val_bpb" in record] == [4, 8]
    monkeypatch.undo()
    result = train(recipe, run, resume=True)
    assert result.val_bpb is not None and not result.stopped_by_signal
    assert_same_run(run, straight)


def test_resuming_a_finished_run_changes_no_file(copied):
    recipe, run = copied
    before = snapshot(run)
    result = train(recipe, run, resume=True)
    assert result.step == 12 and result.val_bpb is not None
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("manifest.json", "model.safetensors") for damage in ("flip", "half", "missing")),
        ("ema.safetensors", "half"),
        ("optimizer.safetensors", "flip"),
        ("recipe.yaml", "missing"),
        ("rng.safetensors", "missing"),
        ("state.json", "half"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(copied, trained, name, damage):
    recipe, run = copied
    path = run / "checkpoints/step-00000012" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    output = resume(recipe, run)
    assert f"warning: damaged checkpoint: {path}: " in output
    assert "resuming from step 8" in output
    assert "step-00000012.damaged" in checkpoint_names(run)
    assert records(run) == records(trained[1])


def test_without_an_intact_checkpoint_every_resume_is_an_error(copied):
    recipe, run = copied
    for step in ("step-00000008", "step-00000012"):
        (run / "checkpoints" / step / "manifest.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ValueError, match="no intact checkpoint .*step-00000008.damaged, step-00000012.damaged"):
            train(recipe, run, resume=True)
    assert len(losses(run)) == 12


def test_a_run_without_a_checkpoint_yet_starts_over(copied, trained):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints")
    train(recipe, run, resume=True)
    assert_same_run(run, trained[1])


def test_resuming_nothing_starts_a_run(trained, tmp_path):
    recipe, straight = trained
    train(recipe, tmp_path / "deep" / "run", resume=True)
    assert_same_run(tmp_path / "deep" / "run", straight)


def test_more_steps_continue_with_the_schedule_of_the_new_length(copied):
    recipe, run = copied
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 14})})
    output = resume(longer, run)
    assert "train.steps was 12 and is now 14; the schedule is recomputed for 14 steps" in output
    found = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, 15))
    assert load_recipe(run / "recipe.yaml") == longer


def test_neutral_keys_may_differ(copied, tmp_path):
    recipe, run = copied
    moved = shutil.copytree(recipe.data.dir, tmp_path / "elsewhere")
    other = recipe.model_copy(
        update={
            "description": "another",
            "data": recipe.data.model_copy(update={"dir": str(moved)}),
            "train": recipe.train.model_copy(update={"eval_every": 0, "keep_checkpoints": 5, "steps": 13}),
        }
    )
    assert train(other, run, resume=True).step == 13


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer.lr=0.02"], "train.optimizer.lr is 0.01 in the run to resume and 0.02 now"),
        (["model.dim=32"], "model.dim is 16 in the run to resume and 32 now"),
        (["train.seed=1"], "train.seed is 0 in"),
        (["train.schedule={type: cosine}"], 'train.schedule.type is "wsd" in the run to resume and "cosine" now'),
        (["train.ema=null"], "train.ema is 0.9 in the run to resume and null now"),
        (["train.steps=11"], "train.steps=11: the run to resume has 12 steps; give at least 12"),
        (["name=other"], 'name is "tiny" in'),
    ],
)
def test_another_recipe_is_refused_by_its_first_different_key(copied, trained, overrides, message):
    _, run = copied
    other = tiny_recipe(trained[1].parent, *overrides)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        train(other, run, resume=True)
    assert "\n" not in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_environment_json_is_rewritten_only_if_steps_are_computed(copied):
    recipe, run = copied
    (run / "environment.json").write_text('{"device": "cpu", "device_name": "of the first machine"}')
    (run / "recipe.yaml").write_text(dump_recipe(recipe.model_copy(update={"description": "of the first machine"})))
    train(recipe, run, resume=True)
    assert "of the first machine" in (run / "environment.json").read_text()
    assert load_recipe(run / "recipe.yaml").description == "of the first machine"
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 13})})
    train(longer, run, resume=True)
    assert "of the first machine" not in (run / "environment.json").read_text()
    assert load_recipe(run / "recipe.yaml") == longer


def test_memory_keys_may_change_and_losses_differ_by_rounding(tmp_path):
    common = ["model.dropout=0", "train.steps=4", "train.checkpoint_every=2", "train.eval_every=0"]
    train(tiny_recipe(tmp_path, *common), tmp_path / "straight")
    run = shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-00000004")
    changes = ["train.micro_batch_size=1", "runtime.recompute=mixer", "runtime.device=auto"]
    output = resume(tiny_recipe(tmp_path, *common, *changes), run)
    assert "train.micro_batch_size was 2 and is now 1; losses may differ by rounding" in output
    assert losses(run) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
    assert losses(run)[:2] == losses(tmp_path / "straight")[:2]


def test_runtime_may_change_on_another_kind_of_device_alone(copied, trained):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints/step-00000012")
    other = tiny_recipe(trained[1].parent, "runtime.dtype=bfloat16")
    with pytest.raises(ValueError, match='runtime.dtype is "auto" in the run to resume and "bfloat16" now; give the'):
        train(other, run, resume=True)
    edit_header(run, "environment.json", lambda text: json.dumps(json.loads(text) | {"device": "cuda"}))
    output = resume(other, run)
    assert "the run was on cuda and is now on cpu; losses may differ by rounding" in output
    assert losses(run)[:8] == losses(trained[1])[:8] and losses(run)[8:] != losses(trained[1])[8:]
    assert json.loads((run / "environment.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "optimizer",
    [
        "{type: sgd, lr: 0.1}",
        "{type: sgd, lr: 0.1, nesterov: true}",
        "{type: adamw, lr: 0.01, cautious: true}",
        "{type: muon_adamw, matrix: {scheme: turbo, cautious: true}, rest: {weight_decay: 0.1, cautious: true}}",
        "{type: normuon_adamw, matrix: {scaling: rms}}",
        "odd",
    ],
)
def test_every_optimizer_resumes_bit_for_bit(tmp_path, monkeypatch, optimizer):
    """Also one of a user, with state of other shapes and dtypes."""
    overrides = ["train.steps=6", "train.checkpoint_every=3", "train.eval_every=0"]
    if optimizer == "odd":
        monkeypatch.setattr(trainer, "build_optimizer", lambda model, *_: Odd(model.parameters(), lr=0.01))
    else:
        overrides.append(f"train.optimizer={optimizer}")
    recipe = tiny_recipe(tmp_path, *overrides)
    train(recipe, tmp_path / "straight")
    run = shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-00000006")
    assert len(Checkpoints(run / "checkpoints").read_tensors(3, "optimizer")) > 10
    train(recipe, run, resume=True)
    assert_same_run(run, tmp_path / "straight")


def test_without_resume_a_run_is_not_overwritten(copied):
    recipe, run = copied
    with pytest.raises(ValueError, match="already holds a run; resume it with --resume or name another with --out"):
        train(recipe, run)


def test_a_run_without_its_recipe_is_refused(copied):
    recipe, run = copied
    (run / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="holds a run without recipe.yaml"):
        train(recipe, run, resume=True)


def test_damaged_lines_of_the_metrics_are_removed(copied, trained):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints/step-00000012")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(["{broken\n", *lines, '{"step": 13, "lo']))
    assert f"line 1 of {run / 'metrics.jsonl'} is damaged" in resume(recipe, run)
    assert_same_run(run, trained[1])
    assert check_run(run) == []
