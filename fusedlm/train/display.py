"""What the user sees during training: a progress bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fusedlm.terminal.screen import Screen, plain
from fusedlm.terminal.text import one_line

_SECONDS_BETWEEN_LINES = 1.0


class Display(Screen):
    """Progress of one run on a console; with None nothing is shown.

    Args:
        verbose: whether the header has the table of backends.
    """

    def __init__(self, console: Console | None, *, verbose: bool = False):
        super().__init__(console)
        self._verbose = verbose
        self._progress: Progress | None = None
        self._task = None
        self._last_line = float("-inf")
        self._steps = 0

    def preparing(self, stage: str, done: int, total: int | None) -> None:
        """Show the progress of data preparation; the callback of `fusedlm.data.prepare`."""
        if self._bar(stage, done, total):
            return
        if self._due() or done == total:
            self.note(f"{stage}: {done:,}" + (f" of {total:,}" if total else ""))

    def header(self, facts: dict[str, str], backends: dict) -> None:
        """Show the facts of the run, one line each, and if verbose a table of the backend of each op, with the reason.

        Args:
            backends: as `fusedlm.runs.backends.use_backends` returns it.
        """
        self.close()
        width = max(map(len, facts), default=0) + 2
        for name, value in facts.items():
            self.note(f"{name + ':':<{width}}{value}")
        if not self._verbose or not backends:
            return
        table = Table("op", "backend", "reason")
        for op, selection in backends.items():
            table.add_row(plain(op), plain(selection.backend), plain(selection.reason))
        self.print(table)

    def begin(self, step: int, steps: int) -> None:
        """Training starts after `step` of `steps`."""
        self._steps = steps
        self._last_line = float("-inf")
        self._bar("training", step, steps)

    def step(self, record: dict) -> None:
        """Show the record of a step."""
        if record.get("skipped"):
            self.note(f"step {record['step']}: loss or gradient norm is not finite; step skipped")
            text = "skipped"
        else:
            text = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
            text += _loads(record)
        if self._bar(text, record["step"], self._steps):
            return
        if self._due() or record["step"] == self._steps:
            self.note(f"step {record['step']}/{self._steps}  {text}  lr {record['lr']:.2e}")

    def validation(self, record: dict) -> None:
        """Show the record of a validation."""
        text = f"step {record['step']}/{self._steps}  validation: {record['val_bpb']:.4f} bits per byte"
        if "val_window" in record:
            text += f" (window {record['val_window']}, stride {record['val_stride']})"
        for name in ("ema", "swa"):
            if f"val_bpb_{name}" in record:
                text += f", {record[f'val_bpb_{name}']:.4f} with {name} weights"
        if "val_bpb_qat" in record:
            text += f", {record['val_bpb_qat']:.4f} quantised"
        self.note(text)

    def close(self) -> None:
        """Remove the bar, after preparation and after training."""
        if self._progress is not None:
            self.stop(self._progress)
            self._progress = None

    def _bar(self, note: str, done: int, total: int | None) -> bool:
        """Show the bar in this state; False if the console is not a terminal."""
        if not self.has_bars:
            return False
        if self._progress is None:
            text = TextColumn("{task.fields[note]}", markup=False)
            self._progress = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                text,
                console=self.console,
            )
            self._task = self._progress.add_task("", total=total, completed=done, note=note)
            self.start(self._progress)
        self._progress.update(self._task, completed=done, total=total, note=one_line(note))
        return True

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True


def _loads(record: dict) -> str:
    """The loads of experts, of a model that has some."""
    if "moe_max_load" not in record:
        return ""
    dead = f", {record['moe_dead']} dead" if record["moe_dead"] else ""
    return f"  load {record['moe_max_load']:.2f}{dead}"
