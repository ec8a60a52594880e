"""A step of Muon on stacks of matrices, in few launches and without waiting for the device."""

import torch
import triton

from fusedlm.distributed import local
from fusedlm.ops.polar.op import runs_kernel
from fusedlm.ops.polar.reference import start_scale
from fusedlm.ops.polar.schemes import scheme_of
from fusedlm.optim import kernels
from fusedlm.optim.kernels import AddressTable
from fusedlm.optim.stacks import NORM_EPS, SCALINGS, Stack

_TILE = {"ROWS": 8, "COLUMNS": 256}
_ROW_TILE = {"ROWS": 4, "COLUMNS": 512}


class StackLaunches:
    """Launches the parts of a step on matrices of one shape, or on the rows of each that a process holds.

    Args:
        stack: float32 matrices on one device.
        update_dtype: of the stack of updates.
    """

    def __init__(self, stack: Stack, update_dtype: torch.dtype):
        self.stack, self._dtype = stack, update_dtype
        self._device = stack.parts[0].parameter.device
        self._gradients, self._parameters, self._rows = AddressTable(), AddressTable(), AddressTable()

    def _addresses(self, tensors: dict[torch.Tensor, torch.Tensor], row_elements: int) -> list[int]:
        """Of the part's first row in the tensor of its parameter."""
        first = {parameter: local(tensor).data_ptr() for parameter, tensor in tensors.items()}
        row_bytes = row_elements * torch.float32.itemsize
        return [first[part.parameter] + part.start * row_bytes for part in self.stack.parts]

    def _states(self, optimizer: torch.optim.Optimizer, key: str) -> dict[torch.Tensor, torch.Tensor]:
        return {part.parameter: optimizer.state[part.parameter][key] for part in self.stack.parts}

    def momentum(self, optimizer: torch.optim.Optimizer, group: dict, shape: tuple[int, int, int]):
        """Updates the momentum of every matrix, all of which have a gradient and a state.

        Args:
            shape: (matrices, rows, columns) of the updates, of which the rows and columns beyond the stack's are zeros.

        Returns:
            The updates before they are orthogonalised, and their squared norms (matrices,).
        """
        rows, columns = self.stack.rows, self.stack.columns
        # Kept until the launch: the address of a copy must stay its own.
        kept = {part.parameter: local(part.parameter.grad) for part in self.stack.parts}
        kept = {parameter: gradient.contiguous() for parameter, gradient in kept.items()}
        gradients = self._addresses(kept, columns)
        momenta = self._addresses(self._states(optimizer, "momentum"), columns)
        found_inf = _found_inf(optimizer)
        start = torch.zeros if shape[1:] != (rows, columns) else torch.empty
        update = start(shape, dtype=self._dtype, device=self._device)
        grid = _grid(rows, columns, len(gradients))
        squares = torch.empty(len(gradients), grid[0], dtype=torch.float32, device=self._device)
        kernels._momentum_kernel[grid](
            self._gradients.of([gradients, momenta], self._device), update, squares, *_found(found_inf, squares),
            float(group["momentum"]), rows, columns, *shape[1:],
            NESTEROV=group["nesterov"], ALIGNED=_aligned(gradients, momenta), HAS_FOUND_INF=found_inf is not None,
            **_TILE, num_warps=4,
        )  # fmt: skip
        return update, squares.sum(1)

    def row_factors(self, optimizer: torch.optim.Optimizer, update: torch.Tensor, beta2: float):
        """Updates the mean squares of rows over steps.

        Returns:
            What every row is multiplied by, and its mean square in this step, both (matrices, rows).
        """
        n, n_rows, n_columns = len(self.stack.parts), self.stack.rows, self.stack.columns
        rows = self._addresses(self._states(optimizer, "row_square"), 1)
        found_inf = _found_inf(optimizer)
        inverse, squares = torch.empty(2, n, n_rows, dtype=torch.float32, device=update.device)
        kernels._row_kernel[(triton.cdiv(n_rows, _ROW_TILE["ROWS"]), n)](
            self._rows.of([rows], self._device), update, inverse, squares, *_found(found_inf, inverse),
            float(beta2), NORM_EPS, n_rows, n_columns, *update.shape[1:],
            HAS_FOUND_INF=found_inf is not None, **_ROW_TILE, num_warps=4,
        )  # fmt: skip
        return inverse, squares

    def apply(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict,
        update: torch.Tensor,
        scaling: float,
        by_row: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Updates the parameters.

        Args:
            by_row: what every row of the update is multiplied by, and a further factor of every matrix.
        """
        rows, columns = self.stack.rows, self.stack.columns
        parameters = self._addresses({part.parameter: part.parameter for part in self.stack.parts}, columns)
        lr, found_inf = group["lr"], _found_inf(optimizer)
        inverse, ratio = by_row or (update, update)
        kernels._update_kernel[_grid(rows, columns, len(parameters))](
            self._parameters.of([parameters], self._device), update, inverse, ratio, *_found(found_inf, update), lr,
            scaling, float(group["weight_decay"]), rows, columns, *update.shape[1:],
            BY_ROW=by_row is not None, CAUTIOUS=group["cautious"], LR_IN_MEMORY=isinstance(lr, torch.Tensor),
            ALIGNED=_aligned(parameters), HAS_FOUND_INF=found_inf is not None, **_TILE, num_warps=4,
        )  # fmt: skip


class FusedStack:
    """Launches the step of one stack.

    Args:
        stack: float32 matrices on one device.
        update_dtype: in which updates are orthogonalised.
    """

    def __init__(self, stack: Stack, update_dtype: torch.dtype):
        self.stack, self._dtype = stack, update_dtype
        self._launches = StackLaunches(stack, update_dtype)
        device = stack.parts[0].parameter.device
        self._runs_kernel = runs_kernel(device, update_dtype, stack.rows, stack.columns)

    def step(self, optimizer: torch.optim.Optimizer, group: dict) -> None:
        """As `fusedlm.optim.muon._step_stack`; every parameter has a gradient and a state."""
        update, squares = self._launches.momentum(optimizer, group, self._update_shape())
        update = self._orthogonalize(update, squares, group["scheme"])
        by_row = None
        if group["beta2"] is not None:
            inverse, squares = self._launches.row_factors(optimizer, update, group["beta2"])
            n, n_rows = inverse.shape
            ratio = torch.empty(n, dtype=torch.float32, device=update.device)
            kernels._ratio_kernel[(n,)](inverse, squares, ratio, n_rows, ROWS=1024, num_warps=4)
            by_row = inverse, ratio
        scaling = SCALINGS[group["scaling"]](self.stack.rows, self.stack.columns)
        self._launches.apply(optimizer, group, update, scaling, by_row)

    def _update_shape(self) -> tuple[int, int, int]:
        n, rows, columns = len(self.stack.parts), self.stack.rows, self.stack.columns
        if self._runs_kernel:
            from fusedlm.ops.polar.triton import padded

            return n, padded(rows), padded(columns)
        return n, rows, columns

    def _orthogonalize(self, update: torch.Tensor, squares: torch.Tensor, scheme: str) -> torch.Tensor:
        if self._runs_kernel:
            from fusedlm.ops.polar.triton import iterate

            scale = start_scale(squares.sqrt(), scheme_of(scheme))
            return iterate(update, scale, scheme, transposed=self.stack.rows > self.stack.columns)
        from fusedlm.ops.polar.reference import orthogonalize

        return orthogonalize(update, scheme, self._dtype).contiguous()


def _grid(rows: int, columns: int, n: int) -> tuple[int, int]:
    return triton.cdiv(rows, _TILE["ROWS"]) * triton.cdiv(columns, _TILE["COLUMNS"]), n


def _found_inf(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    return getattr(optimizer, "found_inf", None)


def _found(found_inf: torch.Tensor | None, other: torch.Tensor) -> tuple[torch.Tensor]:
    return (other if found_inf is None else found_inf,)


def _aligned(*columns: list[int]) -> bool:
    return all(address % 16 == 0 for column in columns for address in column)


class FusedCautiousAdamW:
    """Launches one step of AdamW with cautious weight decay on float32 tensors of one device."""

    def __init__(self):
        self._table = AddressTable()
        self._sizes: list[int] | None = None
        self._blocks: list[torch.Tensor] = []

    def step(self, parameters, gradients, means, squares, steps, group: dict, found_inf) -> None:
        """`steps` are those of this step already."""
        device, lr, (beta1, beta2) = parameters[0].device, group["lr"], group["betas"]
        self._divide([parameter.numel() for parameter in parameters], device)
        tensors, starts, sizes = self._blocks
        if not len(tensors):
            return
        columns = (parameters, gradients, means, squares, steps)
        kernels._cautious_adamw_kernel[(len(tensors),)](
            self._table.of([[x.data_ptr() for x in column] for column in columns], device), tensors, starts, sizes,
            *_found(found_inf, sizes), lr, float(beta1), float(beta2), group["eps"], float(group["weight_decay"]),
            len(parameters), LR_IN_MEMORY=isinstance(lr, torch.Tensor), HAS_FOUND_INF=found_inf is not None,
            BLOCK=kernels._BLOCK, num_warps=4,
        )  # fmt: skip

    def _divide(self, sizes: list[int], device: torch.device) -> None:
        """Blocks of elements: the tensor and the first element of each."""
        if sizes == self._sizes:
            return
        counts = [triton.cdiv(size, kernels._BLOCK) for size in sizes]
        tensors = [t for t, count in enumerate(counts) for _ in range(count)]
        starts = [i * kernels._BLOCK for count in counts for i in range(count)]
        self._blocks = [torch.tensor(values, dtype=torch.int64, device=device) for values in (tensors, starts, sizes)]
        self._sizes = sizes
