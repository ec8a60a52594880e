"""Stopping anywhere and going on gives what never having stopped gives, bit for bit."""

import io
import os
import random
import shutil
import signal

import pytest
from rich.console import Console

from fusedlm.config import load_recipe
from fusedlm.train import train, trainer
from fusedlm.train.checkpoint import Checkpoints
from tests.train.children import training_child, wait_for
from tests.train.runs import checkpoint_names, losses, records, tiny_recipe


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run of one's own."""
    recipe, run = trained
    return recipe, shutil.copytree(run, tmp_path / "run")


def assert_same_run(run, other):
    """Metrics, final weights, optimizer, averages and random numbers agree to the last bit."""
    assert records(run) == records(other)
    one, two = Checkpoints(run / "checkpoints"), Checkpoints(other / "checkpoints")
    last = one.steps()[-1]
    assert two.steps()[-1] == last
    for name in ("model", "optimizer", "ema", "rng"):
        assert one.files(last)[f"{name}.safetensors"] == two.files(last)[f"{name}.safetensors"], name
    assert one.files(last)["state.json"] == two.files(last)["state.json"]


def test_killed_at_random_moments_and_in_a_checkpoint(trained, tmp_path):
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
        assert f"step-{held:08d}.tmp" in checkpoint_names(run)
    train(recipe, run, resume=True)
    assert_same_run(run, straight)
    assert checkpoint_names(run) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(trained, tmp_path, number):
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


def test_a_signal_during_the_last_validation_leaves_it_for_later(trained, tmp_path, monkeypatch):
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


def test_a_finished_run_is_left_as_it_is(copied):
    recipe, run = copied
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "environment.json"}
    result = train(recipe, run, resume=True)
    assert result.step == 12 and result.val_bpb is not None
    assert {path: path.read_bytes() for path in before} == before


def resume_over_damage(recipe, run):
    """What resuming prints."""
    output = io.StringIO()
    train(recipe, run, resume=True, console=Console(file=output, width=200))
    return output.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "recipe.yaml",
        "rng.safetensors",
        "state.json",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "half", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(copied, trained, name, damage):
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
    output = resume_over_damage(recipe, run)
    assert f"warning: damaged checkpoint: {path}: " in output
    assert "going on from step 8" in output
    assert "step-00000012.damaged" in checkpoint_names(run)
    assert records(run) == records(trained[1])


def test_no_intact_checkpoint_is_an_error_now_and_later(copied):
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


def test_more_steps_continue_with_the_schedule_of_the_new_length(copied, tmp_path):
    recipe, run = copied
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 14})})
    output = resume_over_damage(longer, run)
    assert "grows from 12 to 14 steps; the schedule is now that of 14" in output
    found = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, 15))
    assert load_recipe(run / "recipe.yaml") == longer


def test_keys_that_do_not_change_the_steps_may_differ(copied, tmp_path):
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
        (["train.steps=11"], "train.steps=11 is below the 12 of the run to resume"),
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


def test_changed_text_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path, "train.steps=2")
    train(recipe, tmp_path / "run")
    with (tmp_path / "text.txt").open("a") as file:
        file.write("\n---\nmore words")
    with pytest.raises(ValueError, match="the text has changed since the run to resume began"):
        train(recipe, tmp_path / "run", resume=True)


def test_a_run_is_not_overwritten(copied):
    recipe, run = copied
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume or name another with --out"):
        train(recipe, run)


def test_a_run_without_its_recipe_is_refused(copied):
    recipe, run = copied
    (run / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="holds a run without recipe.yaml"):
        train(recipe, run, resume=True)


def test_torn_and_damaged_lines_of_the_metrics(copied, trained):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints/step-00000012")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(["{broken\n", *lines, '{"step": 13, "lo']))
    assert "line 1 of" in resume_over_damage(recipe, run)
    assert_same_run(run, trained[1])
