"""Routed experts that are divided over processes: tokens go to where their experts are, and come back.

A process has some consecutive experts of each layer. It sends a row per token and expert to the process that has the
expert, with its weight; that process runs its experts on all the rows that it receives, and sends the outputs back; and
each token's outputs are summed where the token is. No token is dropped, whatever the loads. Numbers of rows are
exchanged first, and the host waits for them: once per layer and forward pass. The backward pass knows them.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from fusedlm.distributed.rows import exchange_rows
from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.linear import product_dtype
from fusedlm.nn.module import Module
from fusedlm.ops import routed_experts
from fusedlm.ops.experts.order import ExpertOrder, sort_by_expert


class DividedExperts(Experts):
    """`Experts` of which each of X processes holds E / X consecutive ones: parameters are DTensors of the full shape,
    sharded by their first dimension.

    torch.compile leaves it out: graphs end before it, and others begin after it. What it runs are exchanges, and ops
    that are kernels of their own.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh):
        """Takes the parameters of `experts`, with their roles, in parts.

        Args:
            experts: of which there must be a multiple of the mesh's size.
            mesh: one dimension, of the processes that divide the experts.

        Raises:
            ValueError: the experts are quantised.
        """
        if type(experts) is not Experts:
            raise ValueError("experts in few bits run on one device; divide those of the run that they are from")
        Module.__init__(self)
        self.activation, self.slope, self.mesh = experts.activation, experts.slope, mesh
        self.backends = experts.backends
        self.__dict__["_declared"] = experts.__dict__["_declared"]
        for name, parameter in experts.named_parameters():
            part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, torch.nn.Parameter(part, requires_grad=parameter.requires_grad))

    # Not `forward`: a wrapper that gathers parameters (FSDP2) acts in hooks, which no graph can hold either.
    @torch.compiler.disable
    def __call__(self, *arguments):
        return super().__call__(*arguments)

    def forward(self, x_ND: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """As `Experts`, for this process's tokens. All processes of the mesh call this, each with its own."""
        x_ND = x_ND.to(product_dtype(x_ND))
        order = sort_by_expert(indices_NK, len(self.up))
        route = _Route.of(order, self.mesh.get_group())
        rows_RD = route.send(_Spread.apply(x_ND, order, indices_NK.shape[1]))
        weights_R = route.send(weights_NK.flatten()[order.slots])
        rows_RD = routed_experts(
            rows_RD,
            self.up.to_local(),
            self.down.to_local(),
            route.experts_R[:, None],
            weights_R[:, None],
            activation=self.activation,
            slope=self.slope,
            backend=self.backend("routed_experts"),
        )
        return _Collect.apply(route.send_back(rows_RD), order, indices_NK.shape[1])

    def waits_for_device(self, device: torch.device, dtype: torch.dtype) -> bool:
        """For the numbers of rows."""
        return device.type != "cpu"


class _Route:
    """Where rows sorted by expert go.

    experts_R: (R,) int64, the expert of each row that this process receives, among its own.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int], experts_R: torch.Tensor):
        self._group, self._sent, self._received, self.experts_R = group, sent, received, experts_R

    @staticmethod
    def of(order: ExpertOrder, group: dist.ProcessGroup) -> "_Route":
        """Exchanges the numbers of rows, and waits for the device."""
        n_processes = group.size()
        sent_XE = order.ends.diff(prepend=order.ends.new_zeros(1)).long().view(n_processes, -1)
        received_XE = torch.empty_like(sent_XE)
        dist.all_to_all_single(received_XE, sent_XE, group=group)
        sent, received = torch.stack([sent_XE.sum(1), received_XE.sum(1)]).tolist()
        # From each process come rows sorted by expert.
        experts = torch.arange(sent_XE.shape[1], device=sent_XE.device).repeat(n_processes)
        experts_R = experts.repeat_interleave(received_XE.flatten(), output_size=sum(received))
        return _Route(group, sent, received, experts_R)

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, to the processes that have the experts."""
        return exchange_rows(rows, self._sent, self._received, self._group)

    def send_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in the order in which they were received, to where they came from."""
        return exchange_rows(rows, self._received, self._sent, self._group)


class _Spread(torch.autograd.Function):
    """(N, D) -> (N k, D): the row of the token of each slot, in the order of the slots. Its gradient is a sum over the
    slots of a token, without atomics."""

    @staticmethod
    def forward(ctx, x_ND, order, top_k):
        ctx.order, ctx.top_k = order, top_k
        return _spread(x_ND, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _collect(gradient, ctx.order, ctx.top_k), None, None


class _Collect(torch.autograd.Function):
    """The transpose of `_Spread`: (N k, D) -> (N, D), the sum over the slots of each token."""

    @staticmethod
    def forward(ctx, rows, order, top_k):
        ctx.order, ctx.top_k = order, top_k
        return _collect(rows, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _spread(gradient, ctx.order, ctx.top_k), None, None


def _spread(x_ND: torch.Tensor, order: ExpertOrder, top_k: int) -> torch.Tensor:
    return x_ND.index_select(0, order.slots // top_k)


def _collect(rows: torch.Tensor, order: ExpertOrder, top_k: int) -> torch.Tensor:
    """Summed in float32 or better."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.index_select(0, order.rows).unflatten(0, (-1, top_k)).sum(1, dtype=wide).to(rows.dtype)
