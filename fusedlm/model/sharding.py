"""A decoder whose matrices are sharded over processes by torch's FSDP2.

Hidden matrices, embeddings and heads are sharded, one unit per block and one for the rest of the model, in which a tied
embedding and head stay one parameter. The experts of a layer may be divided over processes (`DividedExperts`), and are
then a unit of their own, sharded over those that hold the same experts. Everything else (gains, biases, routers, gates,
convolutions, per-head vectors: well below a hundredth of a model) is held in full and in float32 by every process: it
is what autocast would not cast either, so that a block computes as it does in one process.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from fusedlm.distributed import World, local
from fusedlm.model.build import build_model, check_memory
from fusedlm.model.decoder import Decoder
from fusedlm.nn.ffn.divided_experts import DividedExperts
from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.low_precision import cast_gathered, low_precision_layers
from fusedlm.nn.module import init_weights, parameters_by_kind

SHARDED_KINDS = ("matrix", "embedding", "head")  # of roles


def shard_model(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, zero: int = 3) -> None:
    """Shard the parameters of a decoder in place, best on the meta device: `to_empty` then allocates the shards, and
    `init_weights` draws each parameter in full, one after another, and keeps the process's own shard.

    Losses must be divided by the counts of all processes, as `fusedlm.train.step` does: gradients are summed.

    Args:
        mesh: two dimensions, copies and shards; or named replicate, shard and experts: then each copy is sharded over
            the processes of the last two, but for experts, which are divided over the last one, so that rows of each
            are sharded over the second. It must divide their number, and the second their rows.
        dtype: of activations. bfloat16 on a GPU: shards are gathered in it, and gradients are summed in float32.
        zero: 3: the weights of a block are gathered for each of its passes; 2: those of all, once a step.
    """
    experts, copies = [], mesh
    if mesh.ndim == 3:
        experts = _divide_experts(model, mesh["experts"])
        copies = DeviceMesh(mesh.device_type, mesh.mesh.flatten(1), mesh_dim_names=("replicate", "shard"))
    gathers_low = mesh.device_type == "cuda" and dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if gathers_low else None,
        reduce_dtype=torch.float32 if gathers_low else None,
        cast_forward_inputs=False,
    )
    n_shards = copies.size(1)
    whole = {parameter for _, kind, parameter in parameters_by_kind(model) if kind not in SHARDED_KINDS}
    shared = {"mp_policy": policy, "ignored_params": whole}
    for unit in experts:
        # By rows: the first dimension is that by which they are divided.
        by_rows = {"mesh": mesh["replicate", "shard"], "shard_placement_fn": lambda _: Shard(1)}
        fully_shard(unit, reshard_after_forward=mesh.size(1) > 1 and zero == 3, **by_rows, **shared)
    options = shared | {"mesh": copies, "shard_placement_fn": lambda parameter: _placement(parameter, n_shards)}
    for unit in (*model.blocks, *(model.mtp or ())):
        # With one shard nothing has to be gathered again.
        fully_shard(unit, reshard_after_forward=n_shards > 1 and zero == 3, **options)
    # Its backward pass begins with the head: gathered parameters are kept.
    fully_shard(model, reshard_after_forward=False, **options)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other, and NCCL's sum needs no factor
        if low_precision_layers(unit):
            unit.register_forward_pre_hook(cast_gathered)
    model.gathers_once = zero == 2


def build_sharded_model(
    config,
    *,
    vocab_size: int,
    device: torch.device,
    seed: int,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    zero: int = 3,
    prepare: Callable[[Decoder], None] | None = None,
) -> Decoder:
    """As `build_model`, sharded: the same weights whatever the mesh. A process holds its shards, and while it draws
    them one parameter in full. Errors as there; mesh, dtype and zero as for `shard_model`. prepare: replaces layers of
    the model, which has no memory and is not sharded yet."""
    model = build_model(config, vocab_size=vocab_size, device="meta")
    if prepare is not None:
        prepare(model)
    shard_model(model, mesh, dtype, zero)
    check_memory(model, device)
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


def _divide_experts(model: Decoder, mesh: DeviceMesh) -> list[DividedExperts]:
    """Those now in place of the experts of every layer that has some."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "experts", None), Experts)]
    for layer in layers:
        layer.experts = DividedExperts(layer.experts, mesh)
    return [layer.experts for layer in layers]


def _placement(parameter: nn.Parameter, n_shards: int) -> Shard | None:
    """Stacks of fewer experts than shards are sharded by rows, where these divide; None: by the first dimension."""
    by_rows = parameter.dim() == 3 and parameter.shape[0] < n_shards and parameter.shape[1] % n_shards == 0
    return Shard(1) if by_rows else None


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was called."""
    return isinstance(model, FSDPModule)


def begin_backward(model: nn.Module, *, is_last: bool) -> None:
    """Before the forward pass of a micro-batch: copies sum their gradients after the last one of a step alone, and
    weights that are gathered once a step are held until then."""
    if is_sharded(model):
        model.set_requires_all_reduce(is_last)
        if getattr(model, "gathers_once", False):  # not of those that others have sharded
            model.set_reshard_after_backward(is_last)


def sum_whole_gradients(model: nn.Module, world: World) -> None:
    """After the backward passes of a step: sum the gradients of the parameters that every process holds in full."""
    if world.size == 1:
        return
    parameters = [p for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    gradients = [parameter.grad for parameter in parameters]
    for gradient, total in zip(gradients, _summed(gradients, world), strict=True):
        gradient.copy_(total)


def _summed(gradients: list[torch.Tensor], world: World) -> list[torch.Tensor]:
    if not gradients:
        return []
    total = world.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = total.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


def squared_norm(gradients: list[torch.Tensor], world: World) -> torch.Tensor:
    """() float64, this process's share of the squared norm of all gradients: the sum over processes counts each element
    once, however many of them hold it."""
    norms = torch._foreach_norm([local(gradient) for gradient in gradients])
    by_holders: dict[int, list[torch.Tensor]] = {}
    for gradient, norm in zip(gradients, norms, strict=True):
        by_holders.setdefault(_holders(gradient, world), []).append(norm)
    # Not divided by a tensor of these numbers: copying it to the device waits for the device.
    return sum(torch.stack(held).double().square().sum() / n for n, held in by_holders.items())


def _holders(tensor: torch.Tensor, world: World) -> int:
    """How many processes hold each element."""
    if not isinstance(tensor, DTensor):
        return world.size
    mesh = tensor.device_mesh
    return mesh.size() // math.prod(mesh.size(i) for i, p in enumerate(tensor.placements) if p.is_shard())
