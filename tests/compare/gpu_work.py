"""Work of runs that wait for each other, which test_gpus runs in new processes."""

import os
import signal
import time
from pathlib import Path

import torch

from fusedlm.compare.gpus import VISIBLE_GPUS
from fusedlm.runs.signals import StopSignal

_LONGEST = 60  # seconds to wait


def wait_for(path: Path) -> None:
    end = time.monotonic() + _LONGEST
    while not path.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"{path.name} did not appear")
        time.sleep(0.01)


def meet(own: Path, other: Path, send):
    """What the process sees, once the other work runs too."""
    own.touch()
    wait_for(other)
    return os.environ.get(VISIBLE_GPUS), torch.cuda.is_initialized()


def calibrate(recipe, folder: Path, send) -> float:
    """Seconds per step, once the steps of the other variant are timed too."""
    folder.mkdir(parents=True)
    started = folder.parents[1] / f"timing-{folder.name}"
    started.touch()
    for name in ("latent", "softmax"):
        wait_for(started.with_name(f"timing-{name}"))
    return 0.5


def measure(recipe, run_dir: Path | None, vocab_size: int, lengths: list[int], send) -> None:
    """Reports the GPU as the bytes of the state."""
    send("decoded", (lengths[0], (int(os.environ[VISIBLE_GPUS]), 1.0)))


def one_fails(recipe, run_dir: Path, text: str, weights: str, send) -> dict:
    """The first run is killed while the second runs, which ends once the third has. All fail."""
    records = run_dir.parents[1] / "records"
    run_dir.mkdir(parents=True)
    if run_dir.name == "latent-seed0":
        wait_for(run_dir.with_name("softmax-seed0"))
        os.kill(os.getpid(), signal.SIGKILL)
    if run_dir.name == "softmax-seed0":
        wait_for(records / "latent-seed1.json")
    return {"outcome": "failed", "message": "by design", "final": None}


def all_at_once(recipe, run_dir: Path, text: str, weights: str, send) -> dict:
    """Waits until four runs have started. All fail, with the GPU that they saw."""
    run_dir.mkdir(parents=True)
    for name in ("latent-seed0", "softmax-seed0", "latent-seed1", "softmax-seed1"):
        wait_for(run_dir.with_name(name))
    return {"outcome": "failed", "message": f"on {os.environ[VISIBLE_GPUS]}", "final": None}


def until_stopped(recipe, run_dir: Path, text: str, weights: str, send) -> dict:
    """Saves at SIGINT."""
    end = time.monotonic() + _LONGEST
    with StopSignal() as stop:
        run_dir.mkdir(parents=True)
        send("begin", 0)
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.01)
    (run_dir / "saved").write_text(str(stop.received and stop.received.name))
    return {"outcome": "stopped", "message": "", "final": None}


def full_disk(recipe, run_dir: Path, text: str, weights: str, send) -> dict:
    """The first run meets a full disk while the second runs."""
    if run_dir.name != "latent-seed0":
        return until_stopped(recipe, run_dir, text, weights, send)
    wait_for(run_dir.with_name("softmax-seed0"))
    return {"outcome": "system", "message": "No space left on device", "final": None}
