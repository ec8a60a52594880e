"""fully_shard on each block and the root: training, evaluation and generation are those of the unsharded model."""

import pytest
import torch
import torch.multiprocessing

from fusedlm.testing import assert_close
from tests.distributed import sharded


@pytest.fixture(scope="module", params=[1, 2])
def results(request, tmp_path_factory):
    """Number of processes, and by configuration the results sharded and not."""
    folder, size = tmp_path_factory.mktemp("sharded"), request.param
    arguments = (size, str(folder / "rendezvous"), str(folder / "results"))
    torch.multiprocessing.spawn(sharded.worker, arguments, nprocs=size)
    return size, torch.load(folder / "results", weights_only=False)


def test_every_configuration_was_trained(results):
    assert results[1].keys() == sharded.configs().keys() and len(results[1]) > 5


def test_losses_norms_and_scores_are_those_of_the_unsharded_model(results):
    """Bit for bit in one process."""
    size, found = results
    tolerance = 0 if size == 1 else 1e-6
    for name, (ours, unsharded) in found.items():
        for key in ("loss", "grad_norm", "nll"):
            assert ours[key] == pytest.approx(unsharded[key], rel=tolerance, abs=0), (name, key)
        for a, b in zip(ours["layer losses"], unsharded["layer losses"], strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=0), name
        for a, b in zip(ours["metrics"], unsharded["metrics"], strict=True):
            assert a.keys() == b.keys(), name
            for key in a:  # counts, and sums of nats
                assert _flat(a[key]) == pytest.approx(_flat(b[key]), rel=min(tolerance, 1e-12), abs=0), (name, key)
        assert ours["scored"] == unsharded["scored"], name
        assert ours["text"] == unsharded["text"] and ours["text"], name


def _flat(values: list) -> list:
    return torch.tensor(values).flatten().tolist()


def test_weights_are_those_of_the_unsharded_model(results):
    size, found = results
    for name, (ours, unsharded) in found.items():
        assert ours["weights"].keys() == unsharded["weights"].keys()
        for parameter, value in ours["weights"].items():
            expected = unsharded["weights"][parameter]
            if size == 1:
                assert torch.equal(value, expected), (name, parameter)
            else:
                assert_close(value, expected, 1e-6, f"{name}, {parameter}")


def test_the_steps_moved_something(results):
    for name, (ours, _) in results[1].items():
        assert len(set(ours["loss"])) == sharded.STEPS, name
        assert max(ours["grad_norm"]) > 0.5, "clipping was never at work"
