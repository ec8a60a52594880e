"""Kill random processes of a parallel run at random moments, restart it as torchrun does, and look for what was lost.

    python scripts/kill_check.py [--processes 2] [--kills 20] [--steps 60] [--seed 0]

A small model trains on CPUs over gloo, with a checkpoint every second step. Every second kill is SIGKILL to a random
process while a checkpoint is being written, the others after a random time. The rest of the processes is then killed,
and all resume. A checkpoint is lost if it was there and is gone or damaged after a kill, or if the run resumes from an
earlier one. A sample differs if a process reads other tokens in a step than that of an uninterrupted run.
The exit code is 0 if nothing was lost, no sample differs, and all losses are those of the uninterrupted run.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from fusedlm.config import Recipe, parse_recipe  # noqa: E402
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint  # noqa: E402
from fusedlm.runs.metrics import read_metrics  # noqa: E402

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fusedlm.train"])
_TIMINGS = ("_seconds", "_per_second", "_bytes", "mfu")

_RECIPE = """
name: killed
model:
  dim: 16
  n_layers: 2
  pattern: ga
  blocks:
    g: {mixer: {type: gdn, n_heads: 2, chunk_size: 8}, ffn: {type: moe, n_experts: 3, top_k: 2, hidden: 16}}
    a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu, hidden: 32}}
train:
  seq_len: 16
  batch_size: 12
  micro_batch_size: 3
  ema: 0.9
  optimizer: {type: normuon_adamw}
  schedule: {type: wsd, warmup: 0, decay: 0}
  eval_every: 10
  eval_tokens: 100
  checkpoint_every: 2
runtime: {device: cpu}
"""


class Processes:
    """The processes of a run, started as torchrun starts them; each writes a line per step to `log`/samples-RANK: the
    step and a digest of its tokens.

    Args:
        slow: seconds that writing each file of a checkpoint takes longer, so that kills find it unfinished.
        hold: (rank, step): that process does not finish the first file of the checkpoint of that step.
    """

    def __init__(
        self, recipe: Recipe, run: Path, n: int, log: Path, *, slow: float = 0.0, hold: tuple[int, int] | None = None
    ):
        log.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"slow": slow, "hold": hold}
        self.all = [
            _CONTEXT.Process(target=_worker, args=(rank, n, port, recipe, run, log, options)) for rank in range(n)
        ]
        for process in self.all:
            process.start()

    def kill(self, rank: int) -> None:
        """SIGKILL to one process, then to the others, which torchrun gives time to end; here they have a second."""
        self.all[rank].kill()
        self.all[rank].join()
        for process in self.all:
            process.terminate()
        self.end(patience=1.0)

    def end(self, patience: float | None = None) -> None:
        """Wait for all processes, and kill those that are left."""
        until = None if patience is None else time.monotonic() + patience
        for process in self.all:
            process.join(None if until is None else max(0.0, until - time.monotonic()))
        for process in self.all:
            process.kill()
            process.join()

    @property
    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.all)


def _worker(rank: int, n: int, port: int, recipe: Recipe, run: Path, log: Path, options: dict) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The errors of processes whose neighbour was killed are no news.
    os.dup2(os.open(log / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

    import torch

    from fusedlm.runs import writer
    from fusedlm.train import train, trainer

    torch.set_num_threads(1)
    step, write, record = trainer.train_step, writer.write_tensor_file, trainer.Trainer._step_record
    digests, held = [], None
    if options["hold"] is not None and options["hold"][0] == rank:
        held = f".fusedlm-step-{options['hold'][1]:08d}.tmp"

    def noting_step(model, optimizer, batch, **arguments):
        digests.append(hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest()[:16])
        return step(model, optimizer, batch, **arguments)

    def noting_record(self, *arguments):
        with (log / f"samples-{rank}").open("a") as file:
            file.write(f"{self.state.step} {digests[-1]}\n")
        return record(self, *arguments)

    def slow_write(path, *arguments, **settings):
        time.sleep(options["slow"])
        if held is not None and path.parent.name == held:
            path.write_bytes(b"half")
            (log / "held").write_text(path.name)
            time.sleep(600)
        found = write(path, *arguments, **settings)
        time.sleep(options["slow"])
        return found

    trainer.train_step, writer.write_tensor_file = noting_step, slow_write
    trainer.Trainer._step_record = noting_record
    train(recipe, run, resume=True)


def samples(log: Path) -> set[tuple[str, str]]:
    """(rank and step, digest) of all steps that were computed, repeated ones too; a line that a kill cut is skipped."""
    found = set()
    for path in log.glob("samples-*"):
        for line in path.read_text().split("\n")[:-1]:
            step, digest = line.split()
            found.add((f"{path.name} {step}", digest))
    return found


def losses(run: Path) -> list[dict]:
    """The records of a run without timings."""
    found, _ = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in r.items() if not key.endswith(_TIMINGS)} for r in found]


def lost_checkpoints(run: Path, seen: set[int]) -> int:
    """How many checkpoints that were seen are gone, the newest ones of which none may be removed, or are damaged."""
    checkpoints = Checkpoints(run / "checkpoints")
    there, lost = checkpoints.steps(), 0
    if seen and max(seen) not in there:
        lost += 1
    for step in there:
        try:
            checkpoints.verify(step)
        except DamagedCheckpoint as damage:
            print(f"LOST: {damage}")
            lost += 1
    return lost


def resumed_from(log: Path, before: int) -> int | None:
    """The step before the first line that the main process has added to a log of so many lines; None: it has not."""
    path = log / "samples-0"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(lines[before].split()[0]) - 1 if len(lines) > before else None


def _n_lines(log: Path) -> int:
    path = log / "samples-0"
    return path.read_text().count("\n") if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = draw.choices(["tea", "water", "stone", "a", "river", "old", "bridge", "and"], k=5000)
        documents = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
        (folder / "text.txt").write_text("\n---\n".join(documents))
        source = f"data.source={{type: text, path: {folder / 'text.txt'}, separator: '---'}}"
        options = [source, f"data.dir={folder / 'prepared'}", "data.split={type: hash, fraction: 0.1}"]
        recipe = parse_recipe(_RECIPE, [*options, f"train.steps={arguments.steps}"])
        straight = Processes(recipe, folder / "straight", arguments.processes, folder / "straight-log")
        straight.end()
        return _kill(recipe, folder, arguments, draw)


def _kill(recipe: Recipe, folder: Path, arguments: argparse.Namespace, draw: random.Random) -> int:
    run, log, n = folder / "killed", folder / "killed-log", arguments.processes
    checkpoints = Checkpoints(run / "checkpoints")
    kills = lost = rounds = 0
    differing = set()
    expected, expected_losses = samples(folder / "straight-log"), losses(folder / "straight")
    while kills < arguments.kills:
        rounds += 1
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(log, ignore_errors=True)
        done = False
        while not done:
            newest, lines = max(checkpoints.steps(), default=0), _n_lines(log)
            processes = Processes(recipe, run, n, log, slow=0.02)
            seen, until = set(checkpoints.steps()), time.monotonic() + draw.uniform(0.3, 6.0)
            in_checkpoint = kills % 2 == 0
            rank = draw.randrange(n)
            while processes.is_running and kills < arguments.kills:
                seen |= set(checkpoints.steps())
                writing = any((run / "checkpoints").glob(".fusedlm-*.tmp"))
                if time.monotonic() > until and (writing or not in_checkpoint):
                    time.sleep(draw.uniform(0, 0.05) if in_checkpoint else 0)
                    processes.kill(rank)
                    kills += 1
                    lost += lost_checkpoints(run, seen)
                    where = "while a checkpoint was written" if writing else "between checkpoints"
                    print(f"kill {kills}: rank {rank}, {where}; last checkpoint {max(checkpoints.steps(), default=0)}")
                    break
            else:
                processes.end()
                done = True
            start = resumed_from(log, lines)
            if start is not None and start != newest:
                print(f"LOST: resumed from step {start}, not from {newest}")
                lost += 1
        differing |= samples(log) - expected
        if losses(run) != expected_losses:
            print(f"DIFFERENT: the losses of round {rounds} are not those of the uninterrupted run")
            differing.add(("losses", str(rounds)))
    print(f"{kills} kills in {rounds} rounds: {lost} lost checkpoints, {len(differing)} differing samples")
    return 1 if lost or differing else 0


if __name__ == "__main__":
    sys.exit(main())
