"""Notice that steps on a CPU have become much slower because other processes use it."""

import os
import statistics
from collections import deque
from collections.abc import Callable

FACTOR = 2.5  # of the usual step time
_STEPS = 5  # slow in a row before a note
_MEMORY = 50  # steps of which the usual time is the median


class Slowdown:
    """Watches the time of steps.

    Args:
        cores: cores that this process may use; None: as many as the system allows.
        load: gives the number of processes that want to run, as `os.getloadavg()[0]`.
    """

    def __init__(self, cores: int | None = None, load: Callable[[], float] | None = None):
        self._cores = cores or _usable_cores()
        self._load = load or (lambda: os.getloadavg()[0])
        self._usual: deque[float] = deque(maxlen=_MEMORY)
        self._slow: list[float] = []
        self._told = False

    def step(self, seconds: float) -> str | None:
        """Take the time of a step. Returns a note for the user when a slowdown is certain, once per slowdown."""
        if len(self._usual) < _STEPS:
            self._usual.append(seconds)
            return None
        usual = statistics.median(self._usual)
        if seconds < FACTOR * usual:
            self._usual.append(seconds)
            self._slow, self._told = [], False
            return None
        self._slow.append(seconds)
        if len(self._slow) < _STEPS or self._told:
            return None
        self._told = True
        now = statistics.median(self._slow)
        note = f"steps take {now:.3g} s, usually {usual:.3g} s"
        load = self._load()
        if load > 1.2 * self._cores:
            note += (
                f"; {load:.0f} threads want the {self._cores} cores: another process uses them; wait for it, or give "
                "each process its share with OMP_NUM_THREADS"
            )
        return note


def _usable_cores() -> int:
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
