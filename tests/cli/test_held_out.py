"""What `eval` scores is what the run held out, whatever has happened to its text since."""

import json
import shutil
from pathlib import Path

import pytest

RUN = "runs/small"


def cut(text: Path) -> None:
    text.write_bytes(text.read_bytes()[:600])


def edit(text: Path) -> None:
    text.write_text(text.read_text(encoding="utf-8").replace("times", "by"), encoding="utf-8")


def replace(text: Path) -> None:
    text.write_text("\n---\n".join(f"Other text {i}" for i in range(40)))


@pytest.fixture
def score(fusedlm):
    """Scores a run with options; the figures that depend on its text."""

    def run(*arguments) -> tuple:
        outcome = fusedlm("eval", *arguments, "--json")
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        return result["bpb"], result["bytes"], result["documents"]

    return run


@pytest.mark.parametrize("change", [cut, edit, replace, Path.unlink])
def test_the_source_may_change_or_go(workspace: Path, score, change):
    before = score(RUN)
    change(Path("text.txt"))
    assert score(RUN) == before
    assert [path.name for path in Path("prepared").glob("[!.]*")] == [next(Path("prepared").glob("text-*")).name]


def test_the_text_is_prepared_again_from_a_source_that_moved_back(workspace: Path, score):
    before = score(RUN)
    shutil.rmtree("prepared")
    assert score(RUN) == before


def test_everything_may_move_together(workspace: Path, score, monkeypatch):
    before = score(RUN)
    Path("text.txt").unlink()
    shutil.move(workspace, moved := workspace.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    assert score("moved/runs/small") == before
    monkeypatch.chdir("/")
    assert score(moved / RUN) == before


def test_prepared_text_that_moved_alone_is_named(workspace: Path, score, fusedlm):
    before = score(RUN)
    Path("text.txt").unlink()
    folder = shutil.move("prepared", "elsewhere")
    outcome = fusedlm("eval", RUN)
    assert outcome.code == 2 and "--data FOLDER" in outcome.err
    (text,) = Path(folder).glob("text-*")
    assert score(RUN, "--data", folder) == score(RUN, "--data", text) == before
    text.rename(Path(folder, "renamed"))
    assert score(RUN, "--data", folder) == before


def test_swapped_folders_are_told_apart(workspace: Path, score, fusedlm):
    trained = fusedlm("train", "small.yaml", "data.split.fraction=0.5", "train.steps=1", "--out", "runs/other")
    assert trained.code == 0, trained.err
    before = [score(RUN), score("runs/other")]
    assert before[0][1] != before[1][1]
    one, two = Path("prepared").glob("text-*")
    one.rename("aside")
    two.rename(one)
    Path("aside").rename(two)
    assert [score(RUN), score("runs/other")] == before
    resumed = fusedlm("train", "small.yaml", "train.steps=3", "--resume")
    assert resumed.code == 0 and score(RUN)[1] == before[0][1]
