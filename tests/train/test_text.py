"""A run keeps to its text: by its content, wherever it is, and until a file of it is damaged."""

import io
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from fusedlm.data import prepare
from fusedlm.data.manifest import DamagedData
from fusedlm.train import train, trainer
from tests.train.runs import checkpoint_names, records, tiny_recipe


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with text.txt, prepared/ and the finished run of a recipe with relative paths; read-only."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(tiny_recipe(Path()), Path("run"))
    return folder


@pytest.fixture
def folder(straight, tmp_path, monkeypatch):
    """A copy as the working directory, stopped at step 8."""
    folder = shutil.copytree(straight, tmp_path / "copy")
    shutil.rmtree(folder / "run/checkpoints/step-00000012")
    monkeypatch.chdir(folder)
    return folder


def shard() -> Path:
    return next(Path("prepared").glob("text-*/train-00000.bin"))


def test_a_run_resumes_on_its_prepared_text_if_the_source_changes(folder, straight):
    Path("text.txt").write_text("other\n---\ntext")
    recipe = tiny_recipe(straight, "data.source.path=text.txt", "data.dir=prepared")
    train(recipe, Path("run"), resume=True)
    assert records(Path("run")) == records(straight / "run")


def test_a_run_resumes_where_all_of_it_has_moved(folder, straight, monkeypatch):
    recipe = tiny_recipe(Path())
    Path("text.txt").unlink()
    (elsewhere := folder.parent / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    train(recipe, folder / "run", resume=True)
    assert records(folder / "run") == records(straight / "run")
    assert not any(elsewhere.iterdir())


def test_a_source_may_move_but_not_change(folder, straight):
    Path("text.txt").rename("moved.txt")
    Path("text.txt").write_text("another\n---\ntext")
    recipe = tiny_recipe(Path(), "data.source.path=moved.txt")
    output = io.StringIO()
    train(recipe, Path("run"), resume=True, console=Console(file=output, width=200))
    assert 'data.source.path was "text.txt" and is now "moved.txt"; the content is compared' in output.getvalue()
    assert records(Path("run")) == records(straight / "run")
    longer = tiny_recipe(Path(), "data.source.path=text.txt", "train.steps=13")
    with pytest.raises(ValueError, match=r"^text.txt: the text has changed .*; restore the text or start a new run"):
        train(longer, Path("run"), resume=True)
    assert len(list(Path("prepared").glob("[!.]*"))) == 1


def test_text_that_is_nowhere_is_refused(folder):
    recipe = tiny_recipe(Path())
    shutil.rmtree("prepared")
    for text, reason in (("other\n---\ntext", "the text has changed"), (None, "no such file or directory")):
        Path("text.txt").write_text(text) if text else Path("text.txt").unlink()
        with pytest.raises(ValueError, match=rf"not in data.dir=prepared.*text.txt: {reason}.*; restore the text or"):
            train(recipe, Path("run"), resume=True)


def test_a_run_can_be_bound_to_a_text(folder):
    recipe = tiny_recipe(Path(), "train.steps=1", "train.eval_every=0")
    text = prepare(recipe.data).manifest["fingerprint"]
    Path("text.txt").write_text("\n---\n".join(f"text {i}" for i in range(60)))
    train(recipe, Path("bound"), text=text)
    other = prepare(recipe.data).manifest["fingerprint"]
    for run in ("run", "bound"):
        message = f"holds a run on other text .fingerprint {text[:12]}. than the {other[:12]}"
        with pytest.raises(ValueError, match=message):
            train(tiny_recipe(Path()) if run == "run" else recipe, Path(run), text=other, resume=True)


def cut(path: Path) -> None:
    os.truncate(path, 10)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff\xff" * (path.stat().st_size // 2))


def shuffle(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content[2:] + content[:2])


@pytest.mark.parametrize(("damage", "split"), [(cut, "train"), (overwrite, "train"), (shuffle, "validation")])
def test_a_shard_that_is_damaged_under_a_run_costs_no_step(folder, straight, monkeypatch, damage, split):
    shutil.rmtree("run")
    target = shard().with_name(f"{split}-00000.bin")
    kept = shutil.copy2(target, "kept")
    taken, train_step = [], trainer.train_step

    def step(*arguments, **options):
        taken.append(None)
        if len(taken) == 2:
            damage(target)
        return train_step(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", step)
    recipe = tiny_recipe(Path())
    with pytest.raises(DamagedData, match=f"{target} .*; the last checkpoint is run/checkpoints/step-") as caught:
        train(recipe, Path("run"))
    assert "\n" not in str(caught.value)
    assert checkpoint_names(Path("run"))[-1] == f"step-{len(taken):08d}", "steps were lost"
    shutil.copy2(kept, target)
    train(recipe, Path("run"), resume=True)
    assert records(Path("run")) == records(straight / "run")


def test_a_shard_that_is_only_copied_or_touched_is_accepted(folder, straight, monkeypatch):
    shutil.rmtree("run")
    train_step = trainer.train_step

    def step(*arguments, **options):
        os.utime(path)
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        return train_step(*arguments, **options)

    path = shard()
    monkeypatch.setattr(trainer, "train_step", step)
    train(tiny_recipe(Path()), Path("run"))
    assert records(Path("run")) == records(straight / "run")
