"""The processes that torchrun has started: their group, and the device of each."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fusedlm.distributed.world import OneProcessFailed, World

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
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = next(rendezvous("env://"))[0]
        store = dist.PrefixStore(meet(store, world), store)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    yield World(world.rank, world.size, dist.new_group(backend="gloo", timeout=_PATIENCE)), device
    # Not after an exception: destroying the group may wait for processes that wait for this one, and torchrun, which
    # ends them, would not see it exit.
    if own:
        dist.destroy_process_group()


def meet(store: dist.Store, world: World, poll_seconds: float = 0.01) -> str:
    """A name that the processes of this start have in common, and no earlier start had. All call this.

    torchrun keeps its store when it starts processes again, with the addresses of those that were ended, and
    connecting to one of these fails. Nothing that torchrun tells its processes numbers the starts alike on all
    machines. So each leaves a word of its own, and takes for an answer only one that the main process has given to it.
    """
    word, name = secrets.token_hex(8), f"start-{secrets.token_hex(8)}"
    if not world.is_main:
        store.set(f"word-{world.rank}", word)
        name = store.get(f"answer-{world.rank}-{word}").decode()  # waits for it
        store.set(f"{name}-{world.rank}", "")
        return name
    missing, answered = set(range(1, world.size)), set()
    until = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for rank in list(missing):
            if store.check([f"{name}-{rank}"]):
                missing.discard(rank)
            elif store.check([f"word-{rank}"]):
                # It may be of an earlier start, and another one follow.
                answer = f"answer-{rank}-{store.get(f'word-{rank}').decode()}"
                if answer not in answered:
                    answered.add(answer)
                    store.set(answer, name)
        if missing and time.monotonic() > until:
            raise OneProcessFailed(f"processes {sorted(missing)} of {world.size} did not start")
        time.sleep(poll_seconds if missing else 0.0)
    return name


def _own_gpu() -> torch.device:
    n_processes, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if n_processes > n_gpus:
        raise ValueError(
            f"torchrun started {n_processes} processes on a machine with {n_gpus} GPUs; give --nproc-per-node "
            f"{n_gpus}, or runtime.device=cpu"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
