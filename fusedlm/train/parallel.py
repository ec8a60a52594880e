"""Whether the processes of a run fit its recipe, and how they divide it."""

import hashlib

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusedlm.config import Recipe
from fusedlm.distributed import World


def divided(recipe: Recipe, world: World) -> tuple[int, int, int]:
    """Copies of the model, shards of each, and the processes over which experts are divided.

    Raises:
        ValueError: the processes are not as many as `runtime.parallel` says, or do not divide a batch or the rows of
            experts, or the recipe asks for what one process alone can do.
    """
    parallel, n = recipe.runtime.parallel, world.size
    others = parallel.replicate * parallel.experts
    if n % others or (parallel.shard is not None and others * parallel.shard != n):
        named = f"replicate={parallel.replicate}, shard={'null' if parallel.shard is None else parallel.shard}"
        named += f", experts={parallel.experts}" if parallel.experts > 1 else ""
        multiple = "a multiple of " if parallel.shard is None else ""
        raise ValueError(
            f"runtime.parallel: {named} needs {multiple}{others * (parallel.shard or 1)} processes, and "
            f"this run has {n}; start as many with torchrun --nproc-per-node, or change runtime.parallel"
        )
    for rows, _ in recipe.train.shapes():
        if rows % n:
            raise ValueError(f"train.batch_size={rows}: must be a multiple of the {n} processes that share a batch")
    if n > 1 and recipe.runtime.cuda_graph:
        raise ValueError(
            f"runtime.cuda_graph=true: a graph cannot hold what {n} processes exchange; set runtime.cuda_graph=false"
        )
    n_shards = n // others
    if parallel.experts > 1:
        _check_rows(recipe, n_shards)
    return parallel.replicate, n_shards, parallel.experts


def _check_rows(recipe: Recipe, n_shards: int) -> None:
    """Raises ValueError if the rows of divided experts cannot be sharded."""
    widths = {"model.dim": recipe.model.dim}
    widths |= {f"model.blocks.{name}.ffn.hidden": ffn.hidden for name, ffn in recipe.model.mixtures().items()}
    for key, width in widths.items():
        if width % n_shards:
            raise ValueError(
                f"runtime.parallel: the {n_shards} shards of an expert must divide {key}={width}; change "
                "runtime.parallel.shard, or the number of processes"
            )


def build_mesh(recipe: Recipe, world: World, device_type: str) -> DeviceMesh | None:
    """The processes as (copies, shards), or where experts are divided as (copies, shards, parts of the experts), as
    `fusedlm.model.sharding` takes them, those of a copy with consecutive ranks; None: there is one process. All call
    this. Raises as `divided`."""
    shape, names = divided(recipe, world), ("replicate", "shard", "experts")
    if world.size == 1:
        return None
    n_dims = 3 if recipe.runtime.parallel.experts > 1 else 2
    return init_device_mesh(device_type, shape[:n_dims], mesh_dim_names=names[:n_dims])


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers that a process draws in a step: no process has state of its own, and a resumed run draws
    what an uninterrupted one does."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "little")
