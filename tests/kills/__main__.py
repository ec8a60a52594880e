"""Kill preparing, training and comparing at random moments, and compare what comes of it with undisturbed work.

    python -m tests.kills [--kills 100] [--seed 0] [--work prepare train compare]

Every kill is SIGKILL. After it the same work runs again, as a user would run it. The exit code is 0 if every loss,
gradient norm, validation, checkpoint, shard and record is bit for bit that of the undisturbed work, and nothing
temporary is left.
"""

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.kills.work import WORKS, run

_CONTEXT = multiprocessing.get_context("forkserver")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs="*", choices=list(WORKS), default=list(WORKS))
    arguments = parser.parse_args()
    _CONTEXT.set_forkserver_preload(["tests.kills.work"])
    draw = random.Random(arguments.seed)
    faults = 0
    for name in arguments.work:
        faults += _disturb(name, -(-arguments.kills // len(arguments.work)), draw)
    print(f"{faults} faults")
    return 1 if faults else 0


def _disturb(name: str, kills: int, draw: random.Random) -> int:
    """Kill a work so many times; the number of rounds whose result is not that of the undisturbed work."""
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "work")  # one place for all rounds: files may hold the path
        for _ in range(2):  # the first one imports
            seconds = _undisturbed(name, folder)
        expected = work.result(folder)
        done = rounds = faults = 0
        while done < kills:
            _clear(name, folder)
            rounds += 1
            # Several kills in a round: what has resumed is killed again.
            for _ in range(draw.randint(2, 8)):
                if _run(name, folder, draw.uniform(0.02, seconds)):
                    break
                done += 1
            _run(name, folder, None)
            if work.result(folder) != expected:
                faults += 1
                print(f"FAULT {name}: round {rounds} differs from undisturbed work")
            left = [str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp" in path.name]
            if left:
                faults += 1
                print(f"FAULT {name}: round {rounds} left {', '.join(left)}")
    print(f"{name}: {done} kills in {rounds} rounds, {faults} faults; undisturbed {seconds:.1f} s", flush=True)
    return faults


def _clear(name: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    WORKS[name].begin(folder)


def _undisturbed(name: str, folder: Path) -> float:
    """Do the work from the start; its seconds."""
    _clear(name, folder)
    start = time.monotonic()
    _run(name, folder, None)
    return time.monotonic() - start


def _run(name: str, folder: Path, kill_after: float | None) -> bool:
    """Do the work in a process, which is killed after so many seconds; whether it came to its end."""
    process = _CONTEXT.Process(target=run, args=(name, folder))
    process.start()
    process.join(kill_after)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    if ended and process.exitcode:
        raise SystemExit(f"{name} ended with exit code {process.exitcode}")
    return ended


if __name__ == "__main__":
    sys.exit(main())
