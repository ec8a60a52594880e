"""Batches of steps that one and several processes train, and their exact losses."""

import contextlib

import torch

from fusedlm.data import Batch
from fusedlm.distributed import World
from fusedlm.train import step as step_module
from tests.distributed.models import VOCAB

ROWS, LENGTH = 12, 16


def batch_at(step: int, world: World) -> Batch:
    """This process's rows of the batch of a step: in documents, and with numbers of targets that differ by row."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : row + step % 3] = -100
    documents = (torch.arange(LENGTH) // 7).expand(ROWS, -1)
    n = ROWS // world.size
    own = slice(world.rank * n, (world.rank + 1) * n)
    inputs = [x[own].contiguous() for x in (tokens[:, :-1], targets, documents)]
    return Batch(*inputs, n_valid=int((inputs[1] != -100).sum()), next_sample=0)


@contextlib.contextmanager
def exact_losses(world: World):
    """A list that gets the loss of a step in float64: the records of a run are rounded to float32."""
    forward_backward, sums, found = step_module.forward_backward, [], []

    def noting(*arguments, **options):
        output = forward_backward(*arguments, **options)
        sums.append(output.losses["nll"])
        return output

    step_module.forward_backward = noting
    try:
        yield found
    finally:
        step_module.forward_backward = forward_backward
    found.append(world.sum(torch.stack(sums).sum()).item())
