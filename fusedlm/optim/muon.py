"""Muon and NorMuon for hidden matrices, AdamW for the rest, as one optimizer."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fusedlm.distributed import local
from fusedlm.nn.module import Role
from fusedlm.ops import orthogonalize
from fusedlm.ops.common.device import can_run_triton
from fusedlm.ops.polar.schemes import scheme_of
from fusedlm.optim.cautious_adamw import adamw_step
from fusedlm.optim.sharded_muon import ShardedMatrices
from fusedlm.optim.shards import whole_parts
from fusedlm.optim.stacks import NORM_EPS, SCALINGS, Part, Stack, initialise, parts_of, stacked


class MuonAdamW(torch.optim.Optimizer):
    """Muon, or with `beta2` in a group NorMuon, for groups with `roles`; AdamW for groups without.

    A step of Muon on a matrix W (out, in) with gradient G, in place of AdamW's:

        M <- momentum M + (1 - momentum) G
        U = momentum M + (1 - momentum) G with nesterov, else M
        O = orthogonalize(U)
        NorMuon: v <- beta2 v + (1 - beta2) mean over the row of O^2; O <- |O|_F / |O'|_F O', O' = O / (sqrt(v) + 1e-8)
        W <- W - lr (scaling O + weight_decay W), with `cautious` decay only where O W >= 0

    (Keller Jordan, 2024; arXiv 2502.16982; NorMuon: arXiv 2510.05491.) Every split of a packed matrix and every expert
    of a stack is a matrix of its own. Sharded parameters are orthogonalised as whole matrices all the same: those that
    are whole in one process there, the others by one that is sent their rows (`fusedlm.optim.sharded_muon`). On CUDA
    devices a step does not wait for the device and reads `found_inf` as torch's fused optimizers do. Without sharded
    parameters it can be captured in a CUDA graph.

    Args:
        groups: of hidden matrices: params, roles, lr, momentum, nesterov, weight_decay, cautious, scheme, scaling
            and beta2 (None: Muon). Of the rest: params, lr, betas, eps, weight_decay, cautious.
        update_dtype: in which a GPU sends and orthogonalises updates. On a CPU it is that of the parameters.

    Raises:
        ValueError: a parameter of a group with roles has not two or three dimensions; the scheme or scaling is
            unknown.
    """

    def __init__(self, groups: list[dict], update_dtype: torch.dtype = torch.bfloat16):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "cautious": False, "fused": True})
        self.update_dtype = update_dtype
        self._stacks: dict[int, list[Stack]] = {}
        self._sharded: dict[int, list[ShardedMatrices]] = {}  # those of a mesh together
        self._launchers: dict[tuple, object] = {}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._uses_kernels = self._step_supports_amp_scaling = all(map(can_run_triton, parameters))
        for index, group in enumerate(self.param_groups):
            if "roles" in group:
                scheme_of(group["scheme"])
                if group["scaling"] not in SCALINGS:
                    known = ", ".join(SCALINGS)
                    raise ValueError(f"scaling={group['scaling']!r}: there is no such scaling; one of {known}")
                self._add_matrices(index, list(zip(group["params"], group["roles"], strict=True)))

    def _add_matrices(self, index: int, matrices: list[tuple[torch.nn.Parameter, Role]]) -> None:
        """Those of the group with that index."""
        whole: list[Part] = []
        sharded: dict[DeviceMesh, list] = {}
        for parameter, role in matrices:
            is_sharded = isinstance(parameter, DTensor)
            parts = whole_parts(parameter, role) if is_sharded else parts_of(parameter, role.splits)
            if parts is None:
                sharded.setdefault(parameter.device_mesh, []).append((parameter, role))
            else:
                whole += parts
        self._stacks[index] = stacked(whole)
        if sharded:
            dtype = self.update_dtype if matrices[0][0].device.type == "cuda" else None
            lists = [map(list, zip(*members, strict=True)) for members in sharded.values()]
            self._sharded[index] = [ShardedMatrices(*members, dtype, self._uses_kernels) for members in lists]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for index, group in enumerate(self.param_groups):
            if index in self._stacks:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        initialise(self.state[parameter], parameter, with_rows=group["beta2"] is not None)
                self._step_matrices(group, self._stacks[index])
                for matrices in self._sharded.get(index, []):
                    matrices.step(self, group)
            else:
                adamw_step(self, group)

    def _step_matrices(self, group: dict, stacks: list[Stack]) -> None:
        for index, stack in enumerate(stacks):
            parts = [part for part in stack.parts if part.parameter.grad is not None]
            if not parts:
                continue
            present = stack if len(parts) == len(stack.parts) else Stack(stack.rows, stack.columns, parts)
            if self._uses_kernels:
                self._fused(id(group), index, present).step(self, group)
            else:
                _step_stack(self, group, present)

    def _fused(self, *key):
        """The launcher of a stack, which keeps tables of addresses."""
        group, index, stack = key
        found = self._launchers.get((group, index))
        if found is None or found.stack is not stack:
            from fusedlm.optim.fused_muon import FusedStack

            found = self._launchers[group, index] = FusedStack(stack, self.update_dtype)
        return found


def scaling_of(group: dict, stack: Stack) -> float:
    """The factor of the orthogonal update of a stack's matrices."""
    return SCALINGS[group["scaling"]](stack.rows, stack.columns)


def _step_stack(optimizer: MuonAdamW, group: dict, stack: Stack) -> None:
    """One step in plain PyTorch, the reference of `fused_muon.step_stack`."""
    momentum, updates = group["momentum"], []
    for part in stack.parts:
        m = part.of(local(optimizer.state[part.parameter]["momentum"]))
        g = part.of(local(part.parameter.grad).contiguous())
        m.lerp_(g, 1 - momentum)
        updates.append(torch.lerp(g, m, momentum) if group["nesterov"] else m)
    update = orthogonalize(torch.stack(updates), group["scheme"])
    if group["beta2"] is not None:
        squares = [local(optimizer.state[part.parameter]["row_square"]).view(-1) for part in stack.parts]
        rows = [part.of_rows(values) for part, values in zip(stack.parts, squares, strict=True)]
        update = _normalise_rows(update, rows, group["beta2"])
    update *= scaling_of(group, stack)
    for part, u in zip(stack.parts, update, strict=True):
        w = part.of(local(part.parameter))
        decay = torch.where(u * w >= 0, w, 0.0) if group["cautious"] else w
        w.sub_(group["lr"] * (u + group["weight_decay"] * decay))


def _normalise_rows(update: torch.Tensor, row_squares: list[torch.Tensor], beta2: float) -> torch.Tensor:
    """(B, M, N) with equal rows over steps, at the norm it had; updates the (M,) mean squares of the rows."""
    mean_square = update.square().mean(-1)  # (B, M)
    for v, found in zip(row_squares, mean_square, strict=True):
        v.lerp_(found, 1 - beta2)
    inverse = (torch.stack(row_squares).sqrt() + NORM_EPS).reciprocal()
    before, after = (x.sum(-1, keepdim=True).sqrt() for x in (mean_square, mean_square * inverse.square()))
    # A matrix of zeros stays zero.
    factor = inverse * before / after.clamp(min=torch.finfo(update.dtype).tiny)
    return update * factor[..., None]
