"""The processes that torchrun has started: their group, and the device of each."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from fusedlm.distributed.world import World

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # which torchrun sets
_PATIENCE = timedelta(days=2)  # a process waits while another prepares text; one that has died is noticed at once


def launched() -> World:
    """This process among those that torchrun has started, before they communicate; one process without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return World.current()
    if not all(name in os.environ for name in _VARIABLES):
        return World()
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes of a run, and the device of this one, while the context is open. A single process initialises and
    communicates nothing. A default group that the caller has initialised is used, and left as it is.

    Args:
        device: what the recipe names: "cpu", or "cuda" for the GPU with the local rank of each process.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine.
    """
    world = launched()
    if world.size == 1:
        yield world, device
        return
    own = not dist.is_initialized()
    if device.type == "cuda":
        device = _own_gpu() if own else torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    if own:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield World(world.rank, world.size, dist.new_group(backend="gloo", timeout=_PATIENCE)), device
    # Not after an exception: destroying the group may wait for processes that wait for this one, and torchrun, which
    # ends them, would not see it exit.
    if own:
        dist.destroy_process_group()


def _own_gpu() -> torch.device:
    n_processes, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if n_processes > n_gpus:
        raise ValueError(
            f"torchrun started {n_processes} processes on a machine with {n_gpus} GPUs; give --nproc-per-node "
            f"{n_gpus}, or runtime.device=cpu"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
