"""Whether the processes of a run fit its recipe, and how they divide it."""

import hashlib

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusedlm.config import Recipe
from fusedlm.distributed import World


def divided(recipe: Recipe, world: World) -> tuple[int, int]:
    """Copies of the model, and shards of each.

    Raises:
        ValueError: the processes are not as many as `runtime.parallel` says, or do not divide a batch, or the recipe
            asks for what one process alone can do.
    """
    parallel, n = recipe.runtime.parallel, world.size
    if n % parallel.replicate or (parallel.shard is not None and parallel.replicate * parallel.shard != n):
        named = f"replicate={parallel.replicate}, shard={'null' if parallel.shard is None else parallel.shard}"
        multiple = "a multiple of " if parallel.shard is None else ""
        raise ValueError(
            f"runtime.parallel: {named} needs {multiple}{parallel.replicate * (parallel.shard or 1)} processes, and "
            f"this run has {n}; start as many with torchrun --nproc-per-node, or change runtime.parallel"
        )
    for rows, _ in recipe.train.shapes():
        if rows % n:
            raise ValueError(f"train.batch_size={rows}: must be a multiple of the {n} processes that share a batch")
    if n > 1 and recipe.runtime.cuda_graph:
        raise ValueError(
            f"runtime.cuda_graph=true: a graph cannot hold what {n} processes exchange; set runtime.cuda_graph=false"
        )
    return parallel.replicate, n // parallel.replicate


def build_mesh(recipe: Recipe, world: World, device_type: str) -> DeviceMesh | None:
    """The processes as (copies, shards), those of a copy with consecutive ranks; None: there is one process. All call
    this. Raises as `divided`."""
    shape = divided(recipe, world)
    if world.size == 1:
        return None
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers that a process draws in a step: no process has state of its own, and a resumed run draws
    what an uninterrupted one does."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "little")
