"""Stages of a preparation, and what runs their tasks: processes of this machine, Slurm, Ray."""

import concurrent.futures
import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import dill
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from fusedlm.config.pipeline import LocalExecutor, RayExecutor, SlurmExecutor
from fusedlm.data.meter import ReportProgress
from fusedlm.data.preparation import Submitted

_LOCK = "workers.lock"


@dataclass(frozen=True)
class Stage:
    """Tasks that can run in any order.

    Attributes:
        weights: of each task, in progress.
        is_single: one task, which needs the memory of all.
    """

    name: str
    steps: list[PipelineStep]
    weights: list[int]
    is_single: bool = False


def run_stages(
    stages: list[Stage], folder: Path, config: LocalExecutor | SlurmExecutor | RayExecutor, report: ReportProgress
) -> None:
    """Run what is not complete of each stage, or submit it.

    Raises:
        Submitted: to Slurm.
        ValueError: a task has failed, or the cluster is not there.
    """
    with _quiet():
        if isinstance(config, LocalExecutor):
            _run_locally(stages, folder, config.workers or os.cpu_count() or 1, report)
        elif isinstance(config, SlurmExecutor):
            _submit(stages, folder, config)
        else:
            _run_on_ray(stages, folder, config, report)


def slurm_executors(stages: list[Stage], folder: Path, config: SlurmExecutor) -> list[SlurmPipelineExecutor]:
    """One executor per stage, each depending on the one before it."""
    executors = []
    for stage in stages:
        executors.append(
            SlurmPipelineExecutor(
                stage.steps,
                tasks=len(stage.weights),
                time=config.time,
                partition=config.partition,
                cpus_per_task=config.cpus,
                mem_per_cpu_gb=config.single_memory_gb if stage.is_single else config.memory_gb,
                workers=config.workers or -1,
                job_name=f"fusedlm-{stage.name}",
                qos=config.qos,
                env_command=config.setup,
                sbatch_args=dict(config.sbatch),
                max_array_size=config.max_array,
                depends=executors[-1] if executors else None,
                logging_dir=str(folder / "logs" / stage.name),
            )
        )
    return executors


def ray_executors(stages: list[Stage], folder: Path, config: RayExecutor) -> list[RayPipelineExecutor]:
    """One executor per stage."""
    return [
        RayPipelineExecutor(
            stage.steps,
            tasks=len(stage.weights),
            workers=config.workers or -1,
            cpus_per_task=config.cpus,
            mem_per_cpu_gb=config.single_memory_gb if stage.is_single else config.memory_gb,
            logging_dir=str(folder / "logs" / stage.name),
        )
        for stage in stages
    ]


def _submit(stages: list[Stage], folder: Path, config: SlurmExecutor) -> None:
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise ValueError(
                f"data.pipeline.executor.type=slurm: {program} is not found; submit from a node of the cluster"
            )
    record = folder / "submitted.json"
    if record.exists():
        last = json.loads(record.read_text())["job"]
        queued = subprocess.run(["squeue", "--noheader", f"--jobs={last}"], capture_output=True, text=True)
        if queued.returncode == 0 and queued.stdout.strip():
            raise Submitted(f"the preparation is with Slurm as job {last} and those before it; its logs: {folder}/logs")
    executors = slurm_executors(stages, folder, config)
    try:
        executors[-1].run()
    except subprocess.CalledProcessError as error:
        raise ValueError(f"data.pipeline.executor: sbatch ended with exit code {error.returncode}") from None
    last = str(executors[-1].job_id)
    record.write_text(json.dumps({"job": last}))
    raise Submitted(
        f"submitted to Slurm, the last stage as job {last}; run the same command when it has ended; logs: {folder}/logs"
    )


def _run_on_ray(stages: list[Stage], folder: Path, config: RayExecutor, report: ReportProgress) -> None:
    try:
        import ray
    except ImportError:
        raise ValueError(
            "data.pipeline.executor.type=ray: ray is not installed; pip install 'ray[default]', or use type local"
        ) from None
    if not ray.is_initialized():
        ray.init(address=config.address)
    for stage, executor in zip(stages, ray_executors(stages, folder, config), strict=True):
        with _progress(stage, folder, report):
            executor.run()
        if missing := executor.get_incomplete_ranks():
            raise ValueError(
                f"data.pipeline: {len(missing)} of {len(stage.weights)} tasks of the stage {stage.name} failed; "
                f"{folder}/logs/{stage.name} says why; run again to continue"
            )


class _Tasks(LocalPipelineExecutor):
    """datatrove's local executor, whose tasks are run by `_run_locally`: its own `run` leaves processes behind when it
    is killed, which go on with their tasks, and waits for ever for a worker that was killed."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        # Its log file has all that it also prints to stderr.
        logger.enable("datatrove")
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()
                logger.disable("datatrove")


def wait_for_workers(folder: Path, report: ReportProgress) -> None:
    """Wait until the workers of a killed run have ended; each holds a lock as long as it lives."""
    if not (folder / _LOCK).exists():
        return
    with open(folder / _LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for processes of a killed preparation", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)


def _run_locally(stages: list[Stage], folder: Path, workers: int, report: ReportProgress) -> None:
    with _Pool(workers, folder / _LOCK) as pool:
        for stage in stages:
            executor = _Tasks(stage.steps, tasks=len(stage.weights), logging_dir=str(folder / "logs" / stage.name))
            ranks = executor.get_incomplete_ranks()
            if not ranks:
                continue
            saved = folder / "logs" / stage.name / "executor.pik"
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_bytes(dill.dumps(executor))
            done = sum(stage.weights) - sum(stage.weights[rank] for rank in ranks)
            report(stage.name, done, sum(stage.weights))
            for rank in pool.run(str(saved), ranks):
                done += stage.weights[rank]
                report(stage.name, done, sum(stage.weights))


class _Pool:
    """Worker processes, started when they are first needed; with one worker, or for one task, this process runs it."""

    def __init__(self, workers: int, lock: Path):
        self._workers, self._lock = workers, str(lock)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._others: set = set()

    def run(self, saved: str, ranks: list[int]) -> Iterator[int]:
        """Yields each rank when its task is complete."""
        if self._workers == 1 or len(ranks) == 1:
            for rank in ranks:
                _run_task(saved, rank)
                yield rank
            return
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["fusedlm.data.pipeline.run"])
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._workers, context, initializer=_begin_worker, initargs=(self._lock, sys.path)
            )
        tasks = {self._pool.submit(_run_task, saved, rank): rank for rank in ranks}
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
                yield tasks[task]
        except BrokenProcessPool:
            raise ValueError(
                "data.pipeline: a worker was killed, perhaps for want of memory; run again to continue, or with fewer "
                "data.pipeline.executor.workers"
            ) from None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._pool is None:
            return
        if kind is not None:  # do not wait for tasks that will be run again
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(lock: str, path: list[str]) -> None:
    """In a worker: end with the parent, and until then hold the lock."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too
    global _held
    _held = open(lock, "a")  # noqa: SIM115 (held as long as the process lives)
    fcntl.flock(_held, fcntl.LOCK_SH)
    sys.path[:] = path
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tasks are what runs in parallel


def _end_with_parent() -> None:
    """The workers keep the fork server alive, and each other's queues open, so that none would notice the death of the
    process that they work for."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _run_task(saved: str, rank: int) -> None:
    with open(saved, "rb") as file:
        executor = dill.load(file)
    executor._run_for_rank(rank, local_rank=1)


@contextlib.contextmanager
def _progress(stage: Stage, folder: Path, report: Callable) -> Iterator[None]:
    """Report the tasks that have a completion marker, until the block ends."""
    ended, markers = threading.Event(), folder / "logs" / stage.name / "completions"

    def watch() -> None:
        while not ended.wait(2):
            count()

    def count() -> None:
        done = [int(path.name) for path in markers.glob("*")]
        report(stage.name, sum(stage.weights[rank] for rank in done), sum(stage.weights))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        count()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages of datatrove: its stages are reported as those of fusedlm."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")
