"""World: nothing is communicated with one process; with two gloo processes, everything is."""

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fusedlm.distributed import World
from fusedlm.runs.folder import RunFolder


def test_one_process_communicates_nothing(monkeypatch):
    for name in ("all_reduce", "barrier"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("communicated"))
    world = World.current()
    assert world == World(rank=0, size=1) and world.is_main
    tensor = torch.tensor([1.0, 2.0])
    assert world.sum(tensor) is tensor
    assert world.any(True) is True and world.any(False) is False
    world.barrier()


def test_only_rank_0_is_the_main_process():
    assert [World(rank, 3).is_main for rank in range(3)] == [True, False, False]


def _process(rank: int, folder) -> None:
    """What each process finds, as JSON in folder/rank."""
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **rendezvous)
    world = World.current()
    found = {"world": [world.rank, world.size]}

    tensor = torch.tensor([[rank + 1.0, 10.0]], requires_grad=True)
    total = world.sum(tensor)
    found["sum"], found["own"] = total.tolist(), tensor.tolist()
    found["sum of integers"] = world.sum(torch.tensor(2**40 + rank)).item()
    found["any"] = [world.any(flag) for flag in (False, rank == 1, rank == 0, True)]

    if rank == 0:
        (folder / "before the barrier").write_text("")
    world.barrier()
    found["barrier"] = (folder / "before the barrier").exists()

    with RunFolder(folder / "run", world):
        world.barrier()
        try:
            RunFolder(folder / "run").__enter__()
        except ValueError as error:
            found["locked"] = "in use by another training process" in str(error)
        world.barrier()

    found["gathered"] = world.gathered({"rank": rank})
    (folder / str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_process, args=(tmp_path,), nprocs=2)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for rank in range(2):
        assert found[rank] == {
            "world": [rank, 2],
            "sum": [[3.0, 20.0]],
            "own": [[rank + 1.0, 10.0]],
            "sum of integers": 2**41 + 1,
            "any": [False, True, True, True],
            "barrier": True,
            "locked": True,
            "gathered": [{"rank": 0}, {"rank": 1}],
        }


def _together(rank: int, folder) -> None:
    """What each process gets of calls that one of them fails in, as JSON in folder/rank."""
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **rendezvous)
    world = World.current()

    def outcome(call) -> str:
        try:
            return str(call())
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    def fails(in_rank: int, error: Exception):
        def call():
            if world.rank == in_rank:
                raise error
            return world.rank

        return call

    order = folder / "order"
    found = {
        "sum all": [x.tolist() for x in world.sum_all([torch.tensor(2**40 + rank), torch.tensor([[0.5, rank]])])],
        "dtypes": [str(x.dtype) for x in world.sum_all([torch.tensor(1), torch.tensor(0.5)])],
        "largest": world.largest(3 - rank),
        "largest of each": world.largest_of_each([rank, 7 - rank]),
        "on main": outcome(lambda: world.on_main(lambda: world.rank)),
        "main fails": outcome(lambda: world.on_main(fails(0, ValueError("no text")))),
        "first": outcome(lambda: world.main_first(lambda: order.exists() if rank else order.write_text(""))),
        "second fails": outcome(lambda: world.main_first(fails(1, OSError("no disk")))),
        "together": outcome(lambda: world.together(lambda: world.rank)),
        "one fails": outcome(lambda: world.together(fails(1, ValueError("damaged")))),
    }
    (folder / str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


def test_an_error_of_one_process_is_raised_in_all(tmp_path):
    torch.multiprocessing.spawn(_together, args=(tmp_path,), nprocs=2)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for rank in range(2):
        assert found[rank] == {
            "sum all": [2**41 + 1, [[1.0, 1.0]]],
            "dtypes": ["torch.int64", "torch.float32"],
            "largest": 3,
            "largest of each": [1, 7],
            "on main": "0",
            "main fails": "ValueError: no text",
            "first": ["0", "True"][rank],
            "second fails": "OSError: no disk",
            "together": str(rank),
            "one fails": "ValueError: damaged",
        }
