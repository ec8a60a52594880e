"""torchrun -m fusedlm train: one process speaks, bad input is one line and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedlm.cli import main
from fusedlm.config import dump_recipe
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.train import loop
from tests.train.runs import losses, tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def test_two_processes_train_and_one_speaks(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path, "train.steps=2", "train.eval_every=0")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fusedlm", "train", str(recipe), "--out", str(tmp_path / "run"), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, errors="replace")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation: ") == 2 and done.stdout.count("next: fusedlm eval") == 1
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "run/sample.txt").is_file()


def torchrun_variables(monkeypatch, rank: int, size: int) -> None:
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    for name, value in found.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_all_is_one_line_of_one_process(tmp_path, monkeypatch, capsys, rank):
    torchrun_variables(monkeypatch, rank, 2)
    assert main(["train", str(tmp_path / "missing.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * (rank == 0)


def test_an_error_of_one_process_is_printed_by_it(tmp_path, monkeypatch, capsys):
    torchrun_variables(monkeypatch, 1, 2)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path)))

    def fails(*_):
        raise loop.OneProcessFailed("out of memory")

    monkeypatch.setattr(loop, "processes", fails)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: out of memory\n"


def test_a_recipe_of_several_processes_is_refused_in_one(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path)))
    for override, message in {
        "runtime.parallel.shard=2": "needs 2 processes, and this run has 1",
        "runtime.parallel.replicate=2": "needs a multiple of 2 processes, and this run has 1",
        "runtime.parallel.experts=2": "runtime.parallel.experts=2: the model has no mixture of experts to divide",
        "runtime.parallel.experts=0": "greater than 0",
        "runtime.parallel.shard=0": "greater than 0",
    }.items():
        assert main(["train", str(recipe), override, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


_KILLED_ONCE = """
import os, signal, sys
from fusedlm.cli import main
from fusedlm.train import trainer

step = trainer.Trainer._step

def killed_once(self, *arguments):
    step(self, *arguments)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.world.rank == 1 and self.state.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.Trainer._step = killed_once
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_restarts_all_from_the_last_checkpoint(tmp_path):
    recipe, worker = tmp_path / "r.yaml", tmp_path / "worker.py"
    options = ["train.steps=6", "train.eval_every=0", "train.checkpoint_every=2", "train.checkpoint_async=false"]
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path, *options)))
    worker.write_text(_KILLED_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", "--monitor-interval", "0.1", str(worker)]
    command += ["train", str(recipe), "--out", str(tmp_path / "run"), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, errors="replace")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 4" in done.stdout
    assert len(losses(tmp_path / "run")) == 6 and Checkpoints(tmp_path / "run/checkpoints").steps() == [4, 6]
