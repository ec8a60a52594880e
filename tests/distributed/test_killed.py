"""One of two processes is killed at chosen places; the run that all resume is an uninterrupted one."""

import time

import pytest

from fusedlm.runs.checkpoint import Checkpoints
from scripts.kill_check import Processes, lost_checkpoints, resumed_from, samples
from tests.train.runs import records, tiny_recipe


def when(condition, processes: Processes) -> None:
    """Waits until it holds."""
    while not condition():
        assert processes.is_running, "ended before it was killed"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the run of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("killed")
    Processes(recipe(folder), folder / "straight", 2, folder / "straight-log").end()
    return folder


def recipe(folder):
    steady = ["model.dropout=0.2", "train.checkpoint_every=3", "train.eval_every=6", "train.keep_checkpoints=3"]
    return tiny_recipe(folder, *steady, "train.steps=12", "train.optimizer={type: normuon_adamw}")


def test_killed_processes_lose_no_checkpoint_and_change_no_sample(folder):
    run, log = folder / "killed", folder / "killed-log"
    checkpoints = Checkpoints(run / "checkpoints")
    # Rank 1 in its part of a checkpoint, then the main process in its, then rank 1 between two of them.
    for kill, (rank, held, expected) in enumerate([(1, 6, 3), (0, 9, 6), (1, None, 9)]):
        lines = log.joinpath("samples-0").read_text().count("\n") if kill else 0
        options = {"hold": (rank, held)} if held else {"slow": 0.05}
        processes = Processes(recipe(folder), run, 2, log, **options)
        if held:
            when((log / "held").exists, processes)
            (log / "held").unlink()
        else:
            when(lambda: 9 in checkpoints.steps(), processes)
        seen = set(checkpoints.steps())
        processes.kill(rank)
        assert max(seen) == expected and lost_checkpoints(run, seen) == 0
        if held:
            # The main process cleans up, unless it is the one that was killed.
            assert checkpoints.temporary(held).is_dir() == (rank == 0) and held not in checkpoints.steps()
            assert not (checkpoints.temporary(held) / "manifest.json").exists()
        assert resumed_from(log, lines) == [0, 3, 6][kill]
    Processes(recipe(folder), run, 2, log).end()
    assert checkpoints.steps() == [6, 9, 12] and list(checkpoints.directory.glob(".*")) == []
    assert samples(log) == samples(folder / "straight-log") and len(samples(log)) == 24
    assert records(run) == records(folder / "straight")
    straight = Checkpoints(folder / "straight/checkpoints").files(12)
    tensors = [name for name in straight if name.endswith(".safetensors")]
    assert len(tensors) == 7
    assert {name: checkpoints.files(12)[name] for name in tensors} == {name: straight[name] for name in tensors}
