"""What the processes of tests/distributed/test_many.py run: a file of its own, since they import it.

Four processes are started once; runs of one, two and three leave the others idle.
"""

import contextlib
import math
import os
import signal
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlm.config.train import (
    AdamWConfig,
    MuonAdamWConfig,
    MuonConfig,
    NorMuonAdamWConfig,
    NorMuonConfig,
    RestConfig,
    SGDConfig,
    TrainConfig,
)
from fusedlm.distributed import World
from fusedlm.distributed.rows import exchange_rows
from fusedlm.evaluate import score_documents
from fusedlm.model.precision import autocast
from fusedlm.nn.fake_quantized import FakeQuantization
from fusedlm.nn.module import init_weights
from fusedlm.optim import Averages, build_optimizer, cautious_adamw, muon, optimizer_tensors
from fusedlm.runs import writer as writer_module
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.state import TrainState, model_tensors, restore_state, save_state
from fusedlm.runs.writer import CheckpointWriter
from fusedlm.train import train, trainer
from fusedlm.train.step import train_step
from tests.distributed.low_precision import FP8, LOW_LAYOUTS, chosen, low_precision
from tests.distributed.models import CPU, EXPERTS, FIRST, HEADS, PREDICTED, SECOND, SKEWED, VOCAB, built
from tests.distributed.steps import LENGTH, ROWS, batch_at, exact_losses
from tests.train.runs import losses, tiny_recipe

_REST = RestConfig(lr=0.01, weight_decay=0.1)
ADAMW = AdamWConfig(lr=0.01)
NORMUON = NorMuonAdamWConfig(matrix=NorMuonConfig(lr=0.02, cautious=True), rest=_REST)
LONG = 30
BACKENDS = {"routed_experts": "reference"}
# name -> model, optimizer, steps, sequences per micro-batch
CASES = {
    "adamw 1": (FIRST, ADAMW, LONG, 2),
    "adamw 2": (SECOND, ADAMW, LONG, ROWS),
    "normuon 1": (FIRST, NORMUON, LONG, ROWS),
    "normuon 2": (SECOND, NORMUON, LONG, ROWS),
    "muon": (FIRST, MuonAdamWConfig(matrix=MuonConfig(nesterov=False, scaling="rms")), 4, 1),
    "cautious adamw": (SECOND, AdamWConfig(lr=0.01, cautious=True), 4, ROWS),
    "sgd": (FIRST, SGDConfig(lr=0.1, nesterov=True), 4, ROWS),
    "qat": (FIRST, SGDConfig(lr=0.1), 4, ROWS),  # with rounded matrices
    "experts adamw": (EXPERTS, ADAMW, LONG, 2),
    "experts normuon": (EXPERTS, NORMUON, LONG, ROWS),
    "experts skewed": (SKEWED, NORMUON, 4, 2),
    "qat experts": (PREDICTED, SGDConfig(lr=0.1), 4, ROWS),
    "experts float32": (PREDICTED, NORMUON, 6, 2),
}
ZERO_2 = ("adamw 1", "muon", "experts adamw", "qat")  # the others have ZeRO stage 3
RECOMPUTED = {"muon": "mixer", "normuon 2": "block", "experts normuon": "block"}
# (copies, shards) or (copies, shards, parts of the experts) -> cases. Every case is run by 2, 3 or 4 processes, and the
# long ones by several of these.
LAYOUTS = {
    (1, 2): ["adamw 1", "adamw 2", "normuon 1"],
    (2, 1): ["normuon 2", "cautious adamw", "sgd", "qat"],
    (1, 3): ["adamw 1", "normuon 2", "muon", "qat"],
    (2, 2): ["normuon 1", "muon", "cautious adamw", "sgd"],
    (1, 4): ["adamw 2", "normuon 1"],
    (1, 1, 2): ["experts adamw", "experts skewed", "experts float32"],
    (1, 1, 4): ["experts normuon", "experts skewed"],
    (1, 2, 2): ["experts normuon", "experts float32", "qat experts"],
    (2, 1, 2): ["experts adamw", "experts skewed"],
}


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; all processes call this."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def run_case(name: str, layout: tuple[int, ...] | None, world: World) -> dict:
    """A model trained for some steps in float64, unless the name says float32: losses, norms, metrics, score, and full
    weights and averages."""
    model_name, optimizer_config, steps, micro_batch_size = CASES[name]
    dtype = torch.float32 if name.endswith("float32") else torch.float64
    model = built(model_name, layout, dtype, 2 if name in ZERO_2 else 3).train()
    if layout is not None:
        model.recompute(RECOMPUTED.get(name, "none"))
    optimizer = build_optimizer(model, optimizer_config, CPU)
    averages = Averages(model, TrainConfig(steps=steps, seq_len=LENGTH, batch_size=ROWS, ema=0.9))
    found = {"loss": [], "exact loss": [], "layer losses": [], "grad_norm": [], "metrics": []}
    rounded = FakeQuantization(model, bits=4, embedding_bits=6)
    weights = rounded.applied if name.startswith("qat") else contextlib.nullcontext
    for step in range(steps):
        with exact_losses(world) as exact:
            result = train_step(
                model,
                optimizer,
                batch_at(step, world),
                lr_scale=1.0,
                micro_batch_size=micro_batch_size,
                grad_clip=0.5,
                autocast=partial(autocast, CPU, torch.float32),
                weights=weights,
                world=world,
            )
        averages.update(step)
        found["loss"].append(result.loss)
        found["exact loss"].append(exact[0])
        found["layer losses"].append(result.layer_losses)
        found["grad_norm"].append(result.grad_norm)
        found["metrics"].append({key: value.double() for key, value in result.metrics.items()})
    documents = [(torch.randint(0, VOCAB, (50,), generator=torch.Generator().manual_seed(9)).numpy(), 49)]
    options = {"window": 16, "batch_tokens": 16, "device": CPU, "dtype": torch.float32, "world": world}
    found["nll"] = [score_documents(model, documents, **options).nll]
    with averages.ema.applied():
        found["nll"].append(score_documents(model, documents, **options).nll)
    found["nll"].append(score_documents(model, documents, **options).nll)
    with rounded.applied():
        found["nll"].append(score_documents(model, documents, **options).nll)
    assert len(set(found["nll"])) == 3
    assert found["nll"][0] == found["nll"][2] != found["nll"][1]
    assert model.embedding.weight.dtype == dtype
    full = {name: gathered(tensor).detach().clone() for name, tensor in model_tensors(model).items()}
    full |= {f"ema {name}": gathered(tensor).clone() for name, tensor in averages.ema.state_dict().items()}
    return found | {"tensors": full}


# From process i to process j: one sends nothing, one receives nothing.
SENT = [[1, 0, 3, 0], [2, 1, 0, 0], [0, 0, 0, 0], [4, 1, 2, 0]]


def exchanged(world: World) -> dict:
    """What a process receives of rows that name sender, receiver and number, what it gets back, and their gradients
    where each receiver multiplies by one more than its rank."""
    numbers = [(world.rank, to, n) for to, count in enumerate(SENT[world.rank]) for n in range(count)]
    rows = torch.tensor(numbers, dtype=torch.float64).view(-1, 3).requires_grad_()
    sent, received = SENT[world.rank], [line[world.rank] for line in SENT]
    there = exchange_rows(rows, sent, received, dist.group.WORLD)
    back = exchange_rows(there, received, sent, dist.group.WORLD)
    (there * (world.rank + 1)).sum().backward()
    unchanged, to = torch.equal(back, rows), rows.detach()[:, 1:2]
    return {"there": there.detach(), "unchanged": unchanged, "gradient": rows.grad, "to": to}


def skipped_step(layout: tuple[int, int], world: World) -> dict:
    """A step whose loss is NaN in the last process alone."""
    model = built(SECOND, layout, torch.float32).train()
    optimizer = build_optimizer(model, NORMUON, CPU)
    before = {name: gathered(tensor).clone() for name, tensor in model_tensors(model).items()}
    hook = model.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * torch.nan, *inputs[1:]))
    if world.rank < world.size - 1:
        hook.remove()
    options = {"lr_scale": 1.0, "micro_batch_size": 2, "grad_clip": 1.0, "autocast": contextlib.nullcontext}
    results = [train_step(model, optimizer, batch_at(0, world), **options, world=world)]
    hook.remove()
    unchanged = all(torch.equal(gathered(value), before[name]) for name, value in model_tensors(model).items())
    results.append(train_step(model, optimizer, batch_at(0, world), **options, world=world))
    return {"skipped": [result.skipped for result in results], "unchanged": unchanged}


def updated(name: str, layout: tuple[int, ...], world: World, *, by_kernels: bool) -> list[dict]:
    """Full weights and state of the optimizer after each of three steps in float32, of which the second is skipped."""
    model = built(name, layout, torch.float32).train()
    with pytest.MonkeyPatch.context() as patch:
        for module in (muon, cautious_adamw):
            patch.setattr(module, "can_run_triton", lambda tensor: by_kernels)
        optimizer = build_optimizer(model, NORMUON, CPU, torch.float32)
        # By kernels the host does not read whether a step is skipped.
        assert optimizer._step_supports_amp_scaling == by_kernels
        options = {"lr_scale": 1.0, "micro_batch_size": 2, "grad_clip": 1.0, "autocast": contextlib.nullcontext}
        found = []
        for step in range(3):
            scale = torch.nan if step == 1 and world.rank == 0 else 1.0
            hook = model.embedding.register_forward_hook(lambda *found, scale=scale: found[2] * scale)
            assert train_step(model, optimizer, batch_at(step, world), **options, world=world).skipped == (step == 1)
            hook.remove()
            tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
            found.append({key: gathered(value).clone() for key, value in tensors.items()})
    return found


# Steps after which a run is continued by other numbers of processes; the schedule does not depend on their number.
_MIXTURE = "model.blocks.a.ffn={type: moe, n_experts: 4, top_k: 2, hidden: 8, bias_rate: 0.01}"
# name -> overrides; and steps, processes and runtime.parallel.
CHAINS = {
    "plain": ([], [(8, 4, "{}"), (16, 2, "{}"), (24, 1, "{}"), (30, 3, "{}")]),
    "experts": (
        [_MIXTURE],
        [(4, 4, "{experts: 4}"), (7, 2, "{experts: 2}"), (9, 1, "{}"), (12, 4, "{shard: 2, experts: 2}")],
    ),
}
_STEADY = ["train.batch_size=12", "train.micro_batch_size=2", "model.dropout=0", "train.eval_every=10",
           "train.checkpoint_every=0", "train.schedule={type: wsd, warmup: 0.0, decay: 0.0}", "train.ema=0.9",
           "data.packing=best_fit", "train.optimizer={type: normuon_adamw}"]  # fmt: skip


def chain_recipe(folder: Path, steps: int, *overrides: str):
    return tiny_recipe(folder, *_STEADY, f"train.steps={steps}", *overrides)


# (copies, shards) -> the step after which the next ones take over.
EXACT_CASES = ("normuon 1",)
EXACT_CHAIN = {(2, 2): 8, (1, 2): 16, None: 24, (1, 3): LONG}


def exact_chain(name: str, layout: tuple[int, int] | None, folder: Path, world: World) -> list[float]:
    """The next steps of a case of CASES, from the checkpoint that other processes wrote, in float64; their losses."""
    model_name, optimizer_config, _, micro_batch_size = CASES[name]
    layouts = list(EXACT_CHAIN)
    first = [0, *EXACT_CHAIN.values()][layouts.index(layout)]
    model = built(model_name, layout, torch.float64).train()
    init_weights(model, seed=first)  # other weights than those to restore, after the first part
    optimizer = build_optimizer(model, optimizer_config, CPU)
    averages = Averages(model, TrainConfig(steps=LONG, seq_len=LENGTH, batch_size=ROWS, ema=0.9))
    checkpoints, state = Checkpoints(folder / f"exact {name}"), TrainState(data="none")
    if first:
        state = restore_state(checkpoints, first, model, optimizer, averages, CPU)
    found = []
    writer = CheckpointWriter(checkpoints, world, keep=9, in_background=True, device=CPU)
    for step in range(first, EXACT_CHAIN[layout]):
        with exact_losses(world) as exact:
            train_step(
                model,
                optimizer,
                batch_at(step, world),
                lr_scale=1.0,
                micro_batch_size=micro_batch_size,
                grad_clip=0.5,
                autocast=partial(autocast, CPU, torch.float32),
                world=world,
            )
        averages.update(step)
        state.step, state.ema_updates = step + 1, averages.ema.updates
        found.append(exact[0])
        # The last one, and one that is still being written when the next step changes the tensors.
        if step + 1 == EXACT_CHAIN[layout] or step == first:
            save_state(writer, state, chain_recipe(folder, LONG), model, optimizer, averages, CPU)
    writer.finish()
    return found


def exact_parts(layout: tuple[int, int] | None, folder: Path) -> dict[str, list[float]]:
    return {name: exact_chain(name, layout, folder, World.current()) for name in EXACT_CASES}


def failing_write(folder: Path, world: World) -> dict:
    """A checkpoint that the last process alone cannot write, after one that all have written."""
    model = built(SECOND, (1, 2), torch.float32)
    checkpoints = Checkpoints(folder / "failing")
    writer = CheckpointWriter(checkpoints, world, keep=9, in_background=True, device=CPU)
    writer.begin(1, {"model": model_tensors(model)}, {})
    writer.finish()
    write, found = writer_module.write_tensor_file, {}

    def full(path, *arguments, **options):
        if world.rank == world.size - 1:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    writer_module.write_tensor_file = full
    try:
        writer.begin(2, {"model": model_tensors(model)}, {})
        writer.finish()
    except OSError as error:
        found["error"] = str(error)
    finally:
        writer_module.write_tensor_file = write
    world.barrier()
    found["left"] = sorted(os.listdir(checkpoints.directory))
    return found


class Gathers(TorchDispatchMode):
    """Counts them, `n`."""

    n = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.n += function is torch.ops.c10d._allgather_base_.default
        return function(*arguments, **(options or {}))


def gathers(world: World, zero: int) -> list[int]:
    """How often shards are gathered in each of two steps of three micro-batches, of two blocks and the rest."""
    model = built(SECOND, (1, 2), torch.float32, zero).train()
    optimizer, found = build_optimizer(model, ADAMW, CPU), []
    options = {"lr_scale": 1.0, "micro_batch_size": 2, "grad_clip": None, "autocast": contextlib.nullcontext}
    for i in range(2):
        with Gathers() as counted:
            train_step(model, optimizer, batch_at(i, world), **options, world=world)
        found.append(counted.n)
    return found


def compiled(name: str, layout: tuple[int, ...], world: World, compiler) -> tuple[list[list[float]], int, int]:
    """The losses of three steps of a model, not compiled and compiled, the number of graphs and that of their symbolic
    integers."""
    found, graphs, symbols = [], [], []

    def backend(module, inputs):
        graphs.append(module)
        symbols.extend(x for x in inputs if isinstance(x, torch.SymInt))
        return compiler(module, inputs)

    torch._dynamo.reset()  # widths that other models had otherwise would be symbols
    for compiles in (False, True):
        model = built(name, layout, torch.float32).train()
        if compiles:
            model.compile_blocks(backend=backend)
        optimizer = build_optimizer(model, ADAMW, CPU)
        options = {"lr_scale": 1.0, "micro_batch_size": 3, "grad_clip": None, "autocast": contextlib.nullcontext}
        found.append([train_step(model, optimizer, batch_at(i, world), **options, world=world).loss for i in range(3)])
    return found, len(graphs), len(symbols)


def stopped_run(folder: Path, world: World) -> dict:
    """A run of ZeRO stage 2 in which a signal comes to the last process alone, in step 3."""
    step = trainer.train_step

    def signalling(model, *arguments, **options):
        with Gathers() as counted:
            result = step(model, *arguments, **options)
        signalling.gathers.append(counted.n)
        signalling.steps += 1
        if signalling.steps == 3 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    signalling.steps, signalling.gathers = 0, []
    trainer.train_step = signalling
    try:
        result = train(chain_recipe(folder, 30, "runtime.parallel.zero=2"), folder / "stopped")
    finally:
        trainer.train_step = step
    return {"step": result.step, "signal": result.signal, "gathers": signalling.gathers}


def dropped_out(folder: Path) -> list[list[float]]:
    """The losses of four steps with dropout, uninterrupted and resumed after two."""
    for name, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        train(chain_recipe(folder, steps, "model.dropout=0.3", "train.eval_every=0"), folder / name, resume=True)
    return [losses(folder / name) for name in ("whole", "halves")]


def refused(folder: Path) -> dict[str, str]:
    """The errors of runs that cannot be."""
    errors = {}
    for name, overrides in {
        "batch": ["train.batch_size=9", "train.micro_batch_size=null"],
        "layout": ["runtime.parallel.shard=3"],
        "copies": ["runtime.parallel.replicate=3"],
        "occupied": [],
    }.items():
        try:
            train(chain_recipe(folder, 30, *overrides), folder / ("chain plain" if name == "occupied" else name))
        except ValueError as error:
            errors[name] = str(error)
    return errors


def phase(size: int, folder: Path) -> dict:
    """All that `size` processes run together."""
    world = World.current()
    if size == 1:
        for name, (overrides, chain) in CHAINS.items():
            train(chain_recipe(folder, chain[-1][0], *overrides), folder / f"straight {name}")
        train(chain_recipe(folder, 3, *FP8), folder / "fp8 1")
        found = {None: {name: run_case(name, None, world) for name in CASES}}
        return found | {("low", None): low_precision(None, world)}
    layouts = {layout: names for layout, names in LAYOUTS.items() if math.prod(layout) == size}
    found = {layout: {name: run_case(name, layout, world) for name in names} for layout, names in layouts.items()}
    if size == 4:
        found["exchanged"] = exchanged(world)
    if size == 2:
        train(chain_recipe(folder, 3, *FP8), folder / "fp8 2")
        divided = built(EXPERTS, (1, 1, 2), torch.float32, prepare=lambda model: model.use_backends(BACKENDS))
        found["backends"] = divided.blocks[0].ffn.experts.backends
        found["chosen"] = chosen(chain_recipe(folder, 3, *FP8), world)
        found["skipped"] = skipped_step((1, 2), world)
        found["refused"] = refused(folder)
        pairs = [(FIRST, (1, 2)), (FIRST, (2, 1)), (SKEWED, (1, 1, 2))]
        found["updated"] = [[updated(*pair, world, by_kernels=kernels) for kernels in (False, True)] for pair in pairs]
        found["gathers"] = {zero: gathers(world, zero) for zero in (2, 3)}
        found["dropped out"] = dropped_out(folder)
        found["compiled"] = [compiled(name, (1, 2), world, aot_eager) for name in (SECOND, HEADS)]
        found["compiled"].append(compiled(SKEWED, (1, 1, 2), world, lambda module, _: module))
        found["stopped"] = stopped_run(folder, world)
        found["failing"] = failing_write(folder, world)
    return found | {("low", layout): low_precision(layout, world) for layout in layouts if layout in LOW_LAYOUTS}


def worker(rank: int, folder: Path) -> None:
    """One of four processes; what each finds goes to folder/RANK."""
    torch.set_num_threads(1)
    found, exact = {}, []

    def together(size: int, name: str, call) -> None:
        if rank >= size:
            return
        if size > 1:
            rendezvous = f"file://{folder}/rendezvous-{name}"
            dist.init_process_group(
                "gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=120)
            )
        try:
            call()
            if size > 1:
                dist.barrier()
        finally:
            if size > 1:
                dist.destroy_process_group()

    try:
        for name, (overrides, chain) in CHAINS.items():
            for steps, size, layout in chain:
                recipe = chain_recipe(folder, steps, f"runtime.parallel={layout}", *overrides)
                run = partial(train, recipe, folder / f"chain {name}", resume=True)
                together(size, f"{name}-{steps}", run)
        for layout in EXACT_CHAIN:
            size = math.prod(layout or ())
            together(size, f"exact-{size}", lambda layout=layout: exact.append(exact_parts(layout, folder)))
        found["exact chain"] = exact
        for size in (4, 3, 2, 1):
            together(size, f"phase-{size}", lambda size=size: found.update(phase(size, folder)))
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    torch.save(found, folder / str(rank))
