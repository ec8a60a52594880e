"""TensorBoard: event files in RUN/tensorboard."""

import os
import socket
import time
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.train.loggers.tags import tagged


class TensorBoardLogger:
    """One event file per start. Hides points after the checkpoint that the run resumes from; they are written again.

    Written here and not by `SummaryWriter`, whose thread prints its own traceback when the disk is full.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: microseconds, or seconds in earlier runs.
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._write(file_version="brain.Event:2")
        self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, record: dict) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in tagged(record).items()]
        self._write(step=record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _write(self, **content) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()
