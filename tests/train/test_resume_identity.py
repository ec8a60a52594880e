"""Resuming when files of the run are not its own, cannot be read, or were changed, and beside files of the user."""

import errno
import itertools
import os
import shutil

import pytest

from fusedlm.config import load_recipe
from fusedlm.runs import checkpoint
from fusedlm.runs.identity import read_identity
from fusedlm.runs.integrity import check_run
from fusedlm.train import train
from tests.runs.edits import as_written_before_checksums, edit_checkpoint, edit_header, edit_state
from tests.train.runs import assert_same_run, checkpoint_names, losses, resume, snapshot, tiny_recipe


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_an_error_of_the_system_is_passed_on_and_changes_nothing(copied, monkeypatch, number):
    recipe, run = copied
    before = snapshot(run)

    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "sha256_file", fail)
    with pytest.raises(OSError) as caught:
        train(recipe, run, resume=True)
    assert caught.value.errno == number and "/checkpoints/step-00000012/" in caught.value.filename
    assert snapshot(run) == before


def test_checkpoints_of_another_seed_and_under_another_name_are_set_aside(copied, trained, tmp_path):
    recipe, run = copied
    other = tiny_recipe(trained[1].parent, "train.seed=1", "train.steps=6", "train.eval_every=0")
    train(other, tmp_path / "other")
    theirs, ours = tmp_path / "other/checkpoints", run / "checkpoints"
    shutil.copytree(theirs / "step-00000004", ours / "step-00000004")  # before the run's last one
    shutil.copytree(theirs / "step-00000006", ours / "step-00000014")
    edit_state(run, 14, step=14)
    shutil.copytree(ours / "step-00000008", ours / "step-00000013")
    shutil.rmtree(ours / "step-00000012")
    output = resume(recipe, run)
    for step, reason in ((14, "is of another run"), (13, "holds step 8; rename it to its step")):
        name = f"step-{step:08d}"
        assert f"warning: foreign checkpoint: {ours / name} {reason}" in output
        assert f"kept as {name}.foreign, using the one before it" in output
    assert "kept as step-00000004.foreign\n" in output and "resuming from step 8" in output
    assert_same_run(run, trained[1])
    kept = [f"step-000000{step}.foreign" for step in ("04", "13", "14")]
    assert checkpoint_names(run) == sorted(["step-00000008", "step-00000012", *kept])


def test_a_changed_recipe_beside_the_checkpoints_is_stated_and_not_followed(copied, trained):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints/step-00000012")
    text = (run / "recipe.yaml").read_text()
    for changed in (text.replace("lr: 0.01", "lr: 0.03"), text[: len(text) // 2]):
        (run / "recipe.yaml").write_text(changed)
        with pytest.raises(ValueError, match="train.optimizer.lr is 0.01 in the run to resume and 0.03 now"):
            train(tiny_recipe(trained[1].parent, "train.optimizer.lr=0.03"), run, resume=True)
    output = resume(recipe, run)
    assert f"warning: recipe {run / 'recipe.yaml'}: " in output and "of the checkpoint of step 8 is used" in output
    assert_same_run(run, trained[1])
    assert load_recipe(run / "recipe.yaml") == recipe and check_run(run) == []


def test_the_tokenizer_is_restored_where_it_differs_and_not_written_where_it_does_not(copied):
    recipe, run = copied
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 13})})
    path = run / "tokenizer.meta.json"
    before = snapshot(run)[path]
    train(longer, run, resume=True)
    assert snapshot(run)[path] == before
    path.write_text("{}")
    train(longer, run, resume=True)
    assert path.read_bytes() == before[0]
    edit_state(run, 13, tokenizer="0" * 64)
    with pytest.raises(ValueError, match="the tokenizer has changed since the run to resume began"):
        train(longer, run, resume=True)


@pytest.mark.parametrize("edit", ["hole", "change", "missing"])
def test_records_that_are_missing_or_changed_are_stated(copied, trained, edit):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints/step-00000012")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if edit == "hole":
        path.write_text("".join(line for line in lines if '"step": 3,' not in line))
        expected = "step 3 is missing"
    elif edit == "change":
        lines[2] = lines[2].replace('"loss": ', '"loss": 1')
        path.write_text("".join(lines))
        expected = "line 3 (step 3) was changed, or a line before it was removed"
    else:
        path.unlink()
        expected = "steps 1 to 8 are missing"
    assert f"warning: {path}: {expected}" in resume(recipe, run)
    assert losses(run)[-4:] == losses(trained[1])[-4:]
    assert [f"metrics.jsonl is not as it was written: {expected}."] == check_run(run)


@pytest.mark.parametrize("damage", ["missing", "changed"])
@pytest.mark.parametrize("finished", [True, False])
def test_the_id_of_a_run_is_written_again(copied, damage, finished):
    recipe, run = copied
    before = read_identity(run)
    if not finished:
        shutil.rmtree(run / "checkpoints/step-00000012")
    if damage == "missing":
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text("{}")
    assert f"warning: {run / 'run.json'}: " in resume(recipe, run)
    assert read_identity(run).run == before.run and check_run(run) == []


def test_a_run_of_an_earlier_version_resumes_bit_for_bit(copied, trained):
    recipe, run = copied
    as_written_before_checksums(run)
    shutil.rmtree(run / "checkpoints/step-00000012")
    assert "warning" not in resume(recipe, run)
    assert_same_run(run, trained[1])
    assert read_identity(run) is not None and check_run(run) == []


def test_a_checkpoint_of_another_seed_of_an_earlier_version_is_refused(copied, trained):
    recipe, run = copied
    as_written_before_checksums(run)
    edit_checkpoint(run, 12, "recipe.yaml", lambda text: text.replace("seed: 0", "seed: 1"))
    with pytest.raises(ValueError, match="train.seed is 1 in the run to resume and 0 now"):
        train(recipe, run, resume=True)


def test_nothing_of_the_users_blocks_a_resume(copied, trained):
    recipe, run = copied
    shutil.rmtree(run / "checkpoints/step-00000012")
    own = run / "checkpoints"
    for name in ("step-x.tmp", "step-00000012.tmp", "step-000000061", "notes.damaged"):
        (own / name).write_text("of the user")
    for name in ("step-best.tmp", "step-00000008.tmp", "step-00000009.replaced", "step-000000099", "step-00000001"):
        (own / name).mkdir()
        (own / name / "precious").write_text("of the user")
    assert "warning" not in resume(recipe, run)
    assert_same_run(run, trained[1])
    kept = [path for path in own.rglob("*") if path.is_file() and path.read_bytes() == b"of the user"]
    assert len(kept) == 9


class _Killed(BaseException):
    """Not an Exception: nothing may handle it."""


def test_a_run_killed_at_every_write_of_its_header_resumes_bit_for_bit(tmp_path, monkeypatch):
    overrides = ["train.checkpoint_every=1", "train.eval_every=0", "data.tokenizer={type: bpe, vocab_size: 270}"]
    recipe, longer = (tiny_recipe(tmp_path, *overrides, f"train.steps={steps}") for steps in (1, 2))
    run, straight = tmp_path / "run", tmp_path / "straight"
    for one in (recipe, longer):
        train(one, straight, resume=True)
    replace = os.replace

    def train_until_it_writes(one, name):
        def kill(source, target):
            if target.name == name:
                raise _Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", kill)
        with pytest.raises(_Killed):
            train(one, run, resume=True)
        monkeypatch.undo()

    header = ["environment.json", "tokenizer.json", "tokenizer.meta.json", "run.json", "recipe.yaml", "metrics.jsonl"]
    for name in header:
        train_until_it_writes(recipe, name)
    train(recipe, run, resume=True)
    for name in ("run.json", "recipe.yaml"):
        train_until_it_writes(longer, name)
    train(longer, run, resume=True)
    assert_same_run(run, straight)
    assert check_run(run) == []


def killed_before(rename: int, recipe, run) -> bool:
    """Resume, killed before one of the renames by which files are replaced. False: there are fewer."""
    replace, renames = os.replace, iter(range(1, 1000))

    def until_killed(source, target):
        if next(renames) == rename:
            raise _Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", until_killed)
        try:
            train(recipe, run, resume=True)
        except _Killed:
            return True
    return False


@pytest.mark.parametrize("legacy", [False, True])
def test_a_kill_while_the_header_is_replaced_is_no_change(trained, tmp_path, legacy):
    """Each resume writes the environment again, and here a longer recipe."""
    recipe, straight = trained
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 13})})
    for first in itertools.count(1):
        run = shutil.copytree(straight, tmp_path / f"{first}")
        former = (run / "environment.json").read_text().replace('"date": "2', '"date": "1')
        edit_header(run, "environment.json", lambda text, former=former: former)
        if legacy:
            as_written_before_checksums(run)
        if not killed_before(first, longer, run):
            break
        assert check_run(run) == [], first
        for second in (2, 3):
            killed_before(second, longer, run)
            assert check_run(run) == [], (first, second)
    assert first > 4  # run.json, environment.json, recipe.yaml, run.json
    assert check_run(run) == [] and not read_identity(run).replaced
    (run / "environment.json").write_text(former)
    assert check_run(run) == ["environment.json was changed after it was written."]


def test_a_change_by_somebody_else_is_still_one_after_a_kill(trained, tmp_path):
    recipe, straight = trained
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 13})})
    run = shutil.copytree(straight, tmp_path / "run")
    (run / "environment.json").write_text('{"device": "cpu"}')
    assert killed_before(2, longer, run) and "replaced" in (run / "run.json").read_text()
    assert check_run(run) == ["environment.json was changed after it was written."]
