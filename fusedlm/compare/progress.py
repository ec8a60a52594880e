"""Progress of a grid: live bars on a terminal, plain lines elsewhere."""

import logging
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fusedlm.terminal.screen import Screen

_SECONDS_BETWEEN_LINES = 5.0
_log = logging.getLogger(__name__)


@dataclass
class _Running:
    steps: int
    step: int = 0
    bar: TaskID | None = None  # None: not on a terminal
    last_line: float = float("-inf")


class GridDisplay(Screen):
    """Progress in training steps of all runs together and of each that is running; without a console nothing is shown.

    Runs are known by name.
    """

    def __init__(self, console: Console | None):
        super().__init__(console)
        self._bars: Progress | None = None
        self._grid: TaskID | None = None
        self._running: dict[str, _Running] = {}
        self._all_steps, self._done = 0, 0
        self._n_runs, self._finished = 0, 0
        self._warnings: set[str] = set()

    def open(self, steps: list[int], done: int, n_done: int) -> None:
        """Start the display.

        Args:
            steps: of every run.
            done, n_done: steps and runs already finished.
        """
        self._all_steps, self._done, self._n_runs, self._finished = sum(steps), done, len(steps), n_done
        if not self.has_bars:
            return
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
        )
        self._grid = self._bars.add_task(self._count(), total=self._all_steps, completed=done, note="")
        self.start(self._bars)

    def begin(self, name: str, steps: int) -> None:
        """A run starts or resumes."""
        run = self._running[name] = _Running(steps)
        if self._bars is not None:
            run.bar = self._bars.add_task(name, total=steps, note="")
        else:
            self.note(f"{self._place()} {name}: {steps:,} steps")

    def report(self, name: str, kind: str, content) -> None:
        """Show a message from the process of a run, or of other work: of that, notes and warnings. The same warning is
        logged once."""
        run = self._running.get(name)
        if kind == "note":
            self.note(f"{name}: {content}")
        elif kind == "warning":
            if content not in self._warnings:
                self._warnings.add(content)
                _log.warning(content)
        elif run is None:
            return
        elif kind == "begin":
            if content:
                self.note(f"{name}: resuming from step {content:,}")
            self._show(name, run, content, "")
        elif kind == "step" and not content.get("skipped"):
            note = f"loss {content['loss']:.4f}  {content['tokens_per_second']:,.0f} tokens/s"
            self._show(name, run, content["step"], note)
        elif kind == "validation" and self._bars is None:
            self.note(
                f"{self._place()} {name}: step {content['step']:,} of {run.steps:,}, validation "
                f"{content['val_nll_per_token']:.4f} nats per token, {content['val_bpb']:.4f} bits per byte"
                f" (window {content['val_window']}, stride {content['val_stride']})"
            )

    def end(self, name: str, outcome: str) -> None:
        """A run is finished."""
        self.note(f"{self._place()} {name}: {outcome}")
        run = self._running.pop(name)
        self._done += run.steps
        self._finished += 1
        if self._bars is not None:
            self._bars.update(self._grid, completed=self._completed(), description=self._count())
            self._bars.remove_task(run.bar)

    def close(self) -> None:
        if self._bars is not None:
            self.stop(self._bars)
            self._bars = None

    def _show(self, name: str, run: _Running, step: int, note: str) -> None:
        run.step = step
        if self._bars is not None:
            self._bars.update(run.bar, completed=step, note=note)
            self._bars.update(self._grid, completed=self._completed())
            return
        now = time.monotonic()
        if note and now - run.last_line >= _SECONDS_BETWEEN_LINES:
            run.last_line = now
            self.note(f"{self._place()} {name}: step {step:,} of {run.steps:,}  {note}")

    def _completed(self) -> int:
        return self._done + sum(run.step for run in self._running.values())

    def _place(self) -> str:
        return f"[{self._finished + 1}/{self._n_runs}]"

    def _count(self) -> str:
        return f"{self._finished} of {self._n_runs} runs"
