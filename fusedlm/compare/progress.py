"""Progress of a grid: two live bars on a terminal, plain lines elsewhere."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusedlm.terminal.screen import Screen

_SECONDS_BETWEEN_LINES = 5.0
_log = logging.getLogger(__name__)


class GridDisplay(Screen):
    """Progress in training steps of all runs together and of the current one; without a console nothing is shown."""

    def __init__(self, console: Console | None):
        super().__init__(console)
        self._bars: Progress | None = None
        self._grid = self._current = None
        self._name, self._steps, self._all_steps, self._before = "", 0, 0, 0
        self._n_runs, self._finished = 0, 0
        self._last_line = float("-inf")
        self._warnings: set[str] = set()

    def open(self, steps: list[int], done: int, n_done: int) -> None:
        """Start the display.

        Args:
            steps: of every run.
            done, n_done: steps and runs already finished.
        """
        self._all_steps, self._before, self._n_runs, self._finished = sum(steps), done, len(steps), n_done
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
        self._current = self._bars.add_task("", total=None, note="", visible=False)
        self.start(self._bars)

    def begin(self, name: str, steps: int) -> None:
        """A run starts or resumes."""
        self._name, self._steps = name, steps
        self._last_line = float("-inf")
        if self._bars is not None:
            self._bars.reset(self._current, total=steps, description=name, note="", visible=True)
        else:
            self.note(f"{self._place()} {name}: {steps:,} steps")

    def report(self, kind: str, content) -> None:
        """Show a message from the process of the run. The same warning is logged once."""
        if kind == "note":
            self.note(f"{self._name}: {content}")
        elif kind == "warning":
            if content not in self._warnings:
                self._warnings.add(content)
                _log.warning(content)
        elif kind == "begin":
            if content:
                self.note(f"{self._name}: resuming from step {content:,}")
            self._show(content, "")
        elif kind == "step" and not content.get("skipped"):
            self._show(content["step"], f"loss {content['loss']:.4f}  {content['tokens_per_second']:,.0f} tokens/s")
        elif kind == "validation" and self._bars is None:
            self.note(
                f"{self._place()} {self._name}: step {content['step']:,} of {self._steps:,}, validation "
                f"{content['val_nll_per_token']:.4f} nats per token, {content['val_bpb']:.4f} bits per byte"
                f" (window {content['val_window']}, stride {content['val_stride']})"
            )

    def end(self, outcome: str) -> None:
        """The current run is finished."""
        self.note(f"{self._place()} {self._name}: {outcome}")
        self._before += self._steps
        self._finished += 1
        if self._bars is not None:
            self._bars.update(self._grid, completed=self._before, description=self._count())
            self._bars.update(self._current, visible=False)

    def close(self) -> None:
        if self._bars is not None:
            self.stop(self._bars)
            self._bars = None

    def _show(self, step: int, note: str) -> None:
        if self._bars is not None:
            self._bars.update(self._current, completed=step, note=note)
            self._bars.update(self._grid, completed=self._before + step)
            return
        now = time.monotonic()
        if note and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.note(f"{self._place()} {self._name}: step {step:,} of {self._steps:,}  {note}")

    def _place(self) -> str:
        return f"[{self._finished + 1}/{self._n_runs}]"

    def _count(self) -> str:
        return f"{self._finished} of {self._n_runs} runs"
