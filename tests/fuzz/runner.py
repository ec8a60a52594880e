"""Run fuzz cases in worker processes with bounds on time and memory, and judge what each gives."""

import itertools
import logging
import multiprocessing
import random
import resource
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutations import copy_tree
from tests.fuzz.targets import TARGETS, Target

SECONDS = 30  # most for one case
MEMORY = 2 << 30  # bytes of address space that reading may add
GOOD = ("refused", "same", "said", "plain")
_LONGEST_LINE = 3000
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Case:
    """A case is a function of target, seed and number alone."""

    target: str
    number: int
    seed: int = 0


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    outcome: refused (one line), same (as the intact folder), said (other content, and a note says so), plain (content
    of the user's own, or forged with right checksums); or, each a fault, silent (other content without a word),
    traceback, line (an error that is not one line), hang, killed.
    """

    case: Case
    outcome: str
    file: str = ""
    how: str = ""
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.outcome in GOOD


def make_homes(names, folder: Path) -> None:
    """Write the intact folder of each target."""
    for name in names:
        (folder / name).mkdir(parents=True)
        TARGETS[name].make(folder / name)


def run_case(case: Case, homes: Path) -> Verdict:
    """Damage a copy of the intact folder and read it, in this process."""
    target = TARGETS[case.target]
    target.home = homes / case.target
    draw = random.Random(f"{case.target} {case.seed} {case.number}")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, case.target)
        copy_tree(target.home, folder)
        path, how = target.damage(folder, draw)
        file = str(path.relative_to(folder))
        mode = draw.getrandbits(64)
        try:
            found = target.read(folder, random.Random(mode))
        except (ValueError, OSError) as error:
            text = str(error)
            good = text.strip() and len(text) <= _LONGEST_LINE
            return Verdict(case, "refused" if good else "line", file, how, f"{type(error).__name__}: {text[:300]}")
        except BaseException:
            return Verdict(case, "traceback", file, how, traceback.format_exc()[-1500:])
        return _judge(case, target, path, how, file, found, mode)


def _judge(case: Case, target: Target, path: Path, how: str, file: str, found, mode: int) -> Verdict:
    if target.is_plain(path, how):
        return Verdict(case, "plain", file, how)
    with tempfile.TemporaryDirectory() as work:
        intact = Path(work, case.target)
        copy_tree(target.home, intact)
        for name in target.markers:
            (intact / name).write_text(path.name)
        expected = target.read(intact, random.Random(mode))
    if found.digest == expected.digest and found.said == expected.said:
        return Verdict(case, "same", file, how)
    if found.said != expected.said:
        return Verdict(case, "said", file, how, found.said[:300])
    return Verdict(case, "silent", file, how)


def run_cases(cases: list[Case], homes: Path, workers: int) -> Iterator[Verdict]:
    """Verdicts of all cases, as they come; a worker that hangs or dies is replaced."""
    _CONTEXT.set_forkserver_preload(["tests.fuzz.targets"])
    queue = iter(cases)
    pool = [_Worker(homes) for _ in range(workers)]
    running = 0
    for worker in pool:
        running += worker.start(next(queue, None))
    for worker in itertools.cycle(pool):
        if not running:
            break
        verdict = worker.poll()
        if verdict is None:
            continue
        yield verdict
        running -= 1
        running += worker.start(next(queue, None))
    for worker in pool:
        worker.stop()


def count(verdicts) -> Counter:
    return Counter((verdict.case.target, verdict.outcome) for verdict in verdicts)


class _Worker:
    def __init__(self, homes: Path):
        self._homes, self._process, self._case = homes, None, None

    def start(self, case: Case | None) -> int:
        """Give the worker a case; 1 if there was one."""
        self._case = case
        if case is None:
            return 0
        if self._process is None:
            self._connection, theirs = _CONTEXT.Pipe()
            self._process = _CONTEXT.Process(target=_serve, args=(theirs, self._homes))
            self._process.start()
            theirs.close()
        self._waited = 0.0
        self._connection.send(case)
        return 1

    def poll(self) -> Verdict | None:
        if self._case is None:
            return None
        try:
            if self._connection.poll(0.05):
                return self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return Verdict(self._case, "killed")
        self._waited += 0.05
        if self._waited > SECONDS:
            self._end()
            return Verdict(self._case, "hang")
        return None

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._end()


def _serve(connection, homes: Path) -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.NOTSET)
    while True:
        case = connection.recv()
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        connection.send(run_case(case, homes))
