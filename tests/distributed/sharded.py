"""What the processes of tests/distributed/test_fully_shard.py run. A file of its own: they import it."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fusedlm import build_model, load_recipe
from fusedlm.config.model import ModelConfig
from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch
from fusedlm.distributed import World
from fusedlm.evaluate import score_documents
from fusedlm.generation import generate
from fusedlm.model.precision import autocast
from fusedlm.nn.module import init_weights
from fusedlm.optim import build_optimizer
from fusedlm.testing import wired_config
from fusedlm.train.step import train_step
from tests.generation.conftest import Bytes
from tests.laws.models import one_period

CPU = torch.device("cpu")
VOCAB, ROWS, LENGTH, STEPS = 257, 4, 24, 3
SMALL = """
dim: 32
n_layers: 4
pattern: agcm
blocks:
  a: {mixer: {type: attention, n_heads: 4, n_kv_heads: 2, window: 9}, ffn: {type: swiglu, hidden: 48}}
  g: {mixer: {type: gdn, n_heads: 2}, ffn: {type: routed, hidden: 40}}
  c: {mixer: {type: cmd_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}, ffn: {type: relu2, hidden: 40}}
  m:
    mixer: {type: mamba2, n_heads: 4, state_dim: 8}
    ffn: {type: moe, n_experts: 5, top_k: 2, hidden: 12, bias_rate: 0.1, sequence_loss: 0.1, z_loss: 0.1}
"""


def configs() -> dict[str, ModelConfig]:
    """A model of every kind of part, tied and not, and one period of each recipe that is narrow enough."""
    small = ModelConfig.model_validate(yaml.safe_load(SMALL))
    found = {"small": small, "untied": small.model_copy(update={"tie_embeddings": False}), "wired": wired_config()}
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        config = one_period(load_recipe(path))
        if config.dim <= 512:
            found[path.stem] = config
    # Processes draw dropout for rows of their own.
    return {name: config.model_copy(update={"dropout": 0.0}) for name, config in found.items()}


def sharded(model: torch.nn.Module, size: int) -> torch.nn.Module:
    """fully_shard on each block and the root; gradients are summed, since losses are divided by the counts of all."""
    mesh = init_device_mesh("cpu", (size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def batches(world: World) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    own = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    found = []
    for step in range(STEPS):
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, : 3 * step + 5] = -100  # rows, and so processes, have different numbers of targets
        documents = (torch.arange(LENGTH) // 9).expand(ROWS, -1)
        inputs = [x[own].contiguous() for x in (tokens[:, :-1], targets, documents)]
        found.append(Batch(*inputs, n_valid=int((inputs[1] != -100).sum()), next_sample=0))
    return found


def run(model: torch.nn.Module, world: World, processes: int) -> dict:
    """Losses, gradient norms, held-out nats and a text of a model trained for some steps; its weights, whole."""
    optimizer = build_optimizer(model, AdamWConfig(lr=0.01), CPU)
    if model.mtp is not None:
        model.set_mtp_weight(0.25)  # the same in float32, in which one of the models starts, and in float64
    rows = ROWS // processes  # budget losses are means over a micro-batch
    results = [
        train_step(
            model.train(),
            optimizer,
            batch,
            lr_scale=1.0,
            micro_batch_size=rows,
            grad_clip=0.5,
            autocast=partial(autocast, CPU, torch.float32),
            world=world,
        )
        for batch in batches(world)
    ]
    document = torch.randint(0, VOCAB, (44,), generator=torch.Generator().manual_seed(2)).numpy()
    options = {"device": CPU, "dtype": torch.float32}
    shared = score_documents(model, [(document, 43)], window=16, batch_tokens=16, world=world, **options)
    scores = [shared.nll, score_documents(model, [(document, 43)], window=None, **options).nll]
    text = generate(model, Bytes(), "ab", max_tokens=12, device=CPU, dtype=torch.float32)
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {
        "loss": [result.loss for result in results],
        "layer losses": [list(result.layer_losses.values()) for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "metrics": [{name: x.tolist() for name, x in result.metrics.items()} for result in results],
        "nll": scores,
        "scored": [shared.tokens, shared.bytes, shared.figures],
        "text": text,
        "weights": {name: value.detach().clone() for name, value in weights.items()},
    }


def worker(rank: int, size: int, rendezvous: str, out: str) -> None:
    """One process: every configuration trained sharded, and in the main one unsharded too; all results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    found = {}
    try:
        for name, config in configs().items():
            # Several processes add up in another order, and AdamW takes the sign of gradients that are all rounding.
            dtype = torch.float32 if size == 1 else torch.float64
            model = build_model(config, vocab_size=VOCAB, device="meta").to(dtype)
            sharded(model, size).to_empty(device=CPU)
            init_weights(model, seed=0)
            ours = run(model, World.current(), size)
            if rank == 0:
                found[name] = ours, run(build_model(config, vocab_size=VOCAB, seed=0).to(dtype), World(), size)
        if rank == 0:
            torch.save(found, out)
        dist.barrier()
    finally:
        dist.destroy_process_group()
