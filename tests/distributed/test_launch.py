"""The processes of one start find each other in a store that earlier starts have used."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from fusedlm.distributed import OneProcessFailed, World
from fusedlm.distributed.launch import meet


def started(store, size: int, ranks: list[int]) -> dict[int, str]:
    """The name that each process gets, or its error; of `size` processes those of `ranks` start, in this order."""
    names = {}

    def process(rank: int) -> None:
        try:
            names[rank] = meet(store, World(rank, size), 0.001)
        except (dist.DistStoreError, OneProcessFailed) as error:
            names[rank] = type(error).__name__

    threads = [threading.Thread(target=process, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_every_start_has_a_name_of_its_own():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    orders = ([0, 1, 2], [2, 1, 0], [1, 0], [0, 3, 1, 2])
    starts = [started(store, len(ranks), ranks) for ranks in orders]
    assert [len(set(names.values())) for names in starts] == [1, 1, 1, 1]
    assert len({names[0] for names in starts}) == 4


@pytest.mark.parametrize("first", [[0, 1], [1, 2], [0]])
def test_a_start_that_was_ended_leaves_nothing_that_misleads_the_next(first):
    """In the first one not all processes came."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    assert {"DistStoreError", "OneProcessFailed"} & set(started(store, 3, first).values())
    store.set_timeout(timedelta(seconds=20))
    names = started(store, 3, [2, 1, 0])
    assert len(set(names.values())) == 1 and names[0].startswith("start-")


def test_a_process_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(OneProcessFailed, match=r"processes \[1, 2\] of 3 did not start"):
        meet(store, World(0, 3), 0.001)
