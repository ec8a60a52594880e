"""The weights of routed experts: one stack for each projection."""

import torch

from fusedlm.nn.linear import product_dtype
from fusedlm.nn.module import Constant, Module, Normal, OpUse, Orthogonal, Role
from fusedlm.ops import routed_experts

ROWS = {"swiglu": ("gate", "up"), "relu2": ()}  # the parts of the up-projection


class Experts(Module):
    """The weighted sum of the experts of each token, all of one kind and width.

    up: (E, 2 * hidden, dim) with the rows of gate and up for swiglu, (E, hidden, dim) for relu2. down: (E, dim,
    hidden), which starts at zero. Each expert is a hidden matrix of its own to optimizers.
    """

    op = "routed_experts"

    def __init__(self, *, dim: int, hidden: int, n_experts: int, activation: str, slope: float):
        super().__init__()
        self.activation, self.slope = activation, slope
        splits = tuple((name, hidden) for name in ROWS[activation])
        rows = hidden * max(len(splits), 1)
        self.add_parameter("up", (n_experts, rows, dim), Role("matrix", dim, rows, splits), Normal(dim**-0.5))
        self.add_parameter("down", (n_experts, dim, hidden), Role("matrix", hidden, dim), Constant(0.0))

    def forward(self, x_ND: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        """(N, D), in the dtype of autocast if it is on. Arguments as `routed_experts` takes them."""
        return routed_experts(
            x_ND.to(product_dtype(x_ND)),
            self.up,
            self.down,
            indices_NK,
            weights_NK,
            activation=self.activation,
            slope=self.slope,
            backend=self.backend(self.op),
        )

    def init_orthogonal(self) -> None:
        """Start the up-projections as orthogonal matrices."""
        role, _ = self.__dict__["_declared"]["up"]
        self.__dict__["_declared"]["up"] = (role, Orthogonal(tuple(rows for _, rows in role.splits)))

    def flops(self, n_slots: int) -> int:
        """Of so many pairs of a token and an expert."""
        return 2 * n_slots * self.parameters_of_one()

    def parameters_of_one(self) -> int:
        """Parameters of one expert."""
        return sum(parameter.shape[1] * parameter.shape[2] for parameter in (self.up, self.down))

    def saved_elements(self) -> int:
        """Elements saved for backward per pair of a token and an expert: the output of the up-projection. Rows of the
        input are gathered again, and the activation is recomputed."""
        return self.up.shape[1]

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse(self.op, self.op, {})]
