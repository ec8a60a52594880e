"""Several processes train as one does: losses, norms, weights, averages, scores; and runs that change their number."""

import json
import shutil
import signal

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import save_file

from fusedlm.cli import main
from fusedlm.config import load_recipe
from fusedlm.runs import load
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.testing import assert_close
from tests.distributed import many
from tests.train.runs import losses, records, resume


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where four processes have run everything."""
    folder = tmp_path_factory.mktemp("many")
    many.chain_recipe(folder, 1)  # writes the text
    torch.multiprocessing.spawn(many.worker, (folder,), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process found."""
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(4)]


CASES = [(layout, name) for layout, names in many.LAYOUTS.items() for name in names]


@pytest.mark.parametrize(("layout", "name"), CASES, ids=[f"{c}x{s} {name}" for (c, s), name in CASES])
def test_training_is_that_of_one_process(found, layout, name):
    ours, expected = found[0][layout][name], found[0][None][name]
    assert ours["exact loss"] == pytest.approx(expected["exact loss"], rel=1e-12, abs=0)
    assert len(set(expected["exact loss"])) == many.CASES[name][2], "the steps moved nothing"
    assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6, abs=0)
    # Averages are float32. Of rounded weights: a code may be another one where the float is on the edge.
    bounds = (1e-12, 1e-7, 1e-12, 1e-4)
    for nll, other, bound in zip(ours["nll"], expected["nll"], bounds, strict=True):
        assert nll == pytest.approx(other, rel=bound, abs=0)
    for a, b in zip(ours["layer losses"], expected["layer losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=0)
    for a, b in zip(ours["metrics"], expected["metrics"], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-12, atol=0)
    assert ours["tensors"].keys() == expected["tensors"].keys()
    for key, value in ours["tensors"].items():
        assert_close(value, expected["tensors"][key], 1e-6 if key.startswith("ema ") else 1e-9, key)


def test_every_process_has_the_same_numbers(found):
    for layout, name in CASES:
        for rank in range(1, layout[0] * layout[1]):
            for key in ("loss", "grad_norm", "nll"):
                assert found[rank][layout][name][key] == found[0][layout][name][key], (layout, name, key)


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(found):
    for rank in range(2):
        assert found[rank]["skipped"] == {"skipped": [True, False], "unchanged": True}


def test_compiled_blocks_give_the_same_losses(found):
    eager, compiled = found[0]["compiled"]
    assert compiled == pytest.approx(eager, rel=1e-5) and len(set(eager)) == 3


def test_a_resumed_run_with_dropout_draws_what_an_uninterrupted_one_does(found):
    whole, halves = found[0]["dropped out"]
    assert len(whole) == 4 and halves == whole, "bit for bit"


def test_a_signal_to_one_process_stops_all_at_the_same_step(found, folder):
    for rank in range(2):
        assert found[rank]["stopped"] == {"step": 3, "signal": signal.SIGTERM}
    assert Checkpoints(folder / "stopped/checkpoints").steps() == [3]


def test_every_process_refuses_what_cannot_be(found):
    for rank in range(2):
        errors = found[rank]["refused"]
        assert errors["batch"].startswith("train.batch_size=9: must be a multiple of the 2 processes")
        assert "shard=3 needs 3 processes, and this run has 2" in errors["layout"]
        assert "replicate=3, shard=null needs a multiple of 3 processes" in errors["copies"]
        assert "chain already holds a run" in errors["occupied"]  # known to the main process alone


def test_a_run_continued_by_4_2_1_and_3_processes_is_an_uninterrupted_one(folder):
    steps = {kind: [r for r in records(folder / kind) if "loss" in r] for kind in ("straight", "chain")}
    assert [r["step"] for r in steps["chain"]] == list(range(1, 31))
    for a, b in zip(steps["chain"], steps["straight"], strict=True):
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    scores = {
        kind: {r["step"]: r for r in records(folder / kind) if "val_bpb" in r} for kind in ("straight", "chain")
    }
    for step in (10, 20, 30):
        a, b = scores["chain"][step], scores["straight"][step]
        assert a.keys() == b.keys() and "val_bpb_ema" in a
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key


@pytest.mark.parametrize("name", many.EXACT_CASES)
def test_resumed_by_4_2_1_and_3_processes_losses_are_exact(found, name):
    """In float64, through checkpoints in shards."""
    chain = [loss for part in found[0]["exact chain"] for loss in part[name]]
    expected = found[0][None][name]["exact loss"]
    assert len(chain) == len(expected) == 30 and chain == pytest.approx(expected, rel=1e-12, abs=0)


SHARDS = [f"{stem}.shard-{n:05d}-of-00003.safetensors" for stem in ("model", "optimizer", "ema") for n in (1, 2, 3)]
OTHERS = ["rng.safetensors", "state.json", "recipe.yaml"]


def test_the_checkpoint_has_the_content_of_one_process(folder):
    chain, straight = (Checkpoints(folder / kind / "checkpoints") for kind in ("chain", "straight"))
    last = chain.steps()[-1]
    assert last == 30 and set(chain.files(last)) == {*SHARDS, *OTHERS}
    chain.verify(last)
    sizes = [chain.files(last)[name]["bytes"] for name in SHARDS[3:6]]
    assert max(sizes) < 0.5 * sum(sizes), "of the optimizer state, which is divided"
    for stem in ("model", "optimizer", "ema"):
        a, b = chain.read_tensors(last, stem), straight.read_tensors(last, stem)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert_close(a[name], b[name], 1e-3, f"{stem} {name}")
    state = chain.read_json(last, "state.json")
    assert state["next_sample"] == straight.read_json(last, "state.json")["next_sample"] == 30 * 12
    parallel = load_recipe(folder / "chain/recipe.yaml").runtime.parallel
    assert parallel.shard is None, "the recipe does not depend on the number of processes"
    environment = json.loads((folder / "chain/environment.json").read_text())
    assert environment["processes"] == 3


@pytest.mark.parametrize("layout", list(many.EXACT_CHAIN))
def test_copies_of_a_shard_divide_what_they_write(folder, layout):
    checkpoints, step = Checkpoints(folder / "exact normuon 1"), many.EXACT_CHAIN[layout]
    names, n = checkpoints.table_files(step, "optimizer"), 1 if layout is None else layout[0] * layout[1]
    sizes = [checkpoints.files(step)[name]["bytes"] for name in names]
    assert len(sizes) == n and max(sizes) < 1.6 * sum(sizes) / n


@pytest.fixture
def chain(folder, tmp_path):
    """A copy of the run whose last checkpoint is of three processes."""
    return shutil.copytree(folder / "chain", tmp_path / "chain")


def test_consolidated_it_is_the_file_of_one_process(chain, capsys):
    checkpoints = Checkpoints(chain / "checkpoints")
    before = {stem: checkpoints.read_tensors(30, stem) for stem in ("model", "optimizer", "ema", "rng")}
    weights = load(chain, device="cpu")[0].state_dict()
    assert main(["checkpoint", "consolidate", str(chain)]) == 0
    assert capsys.readouterr().out == f"{checkpoints.path(30)}: 10 files with tensors are now 4\n"
    assert set(checkpoints.files(30)) == {f"{stem}.safetensors" for stem in before} | {"state.json", "recipe.yaml"}
    checkpoints.verify(30)
    for stem, tensors in before.items():
        save_file(tensors, chain / "expected")
        assert (checkpoints.path(30) / f"{stem}.safetensors").read_bytes() == (chain / "expected").read_bytes()
    loaded = load(chain, device="cpu")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert main(["checkpoint", "consolidate", str(chain), "--checkpoint", "30"]) == 0
    assert capsys.readouterr().out == f"{checkpoints.path(30)}: has no shards\n"


@pytest.mark.parametrize("name", [SHARDS[1], SHARDS[5]])
@pytest.mark.parametrize("damage", ["flip", "half", "missing"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_is_used(chain, folder, name, damage):
    path = chain / "checkpoints/step-00000030" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 4
    if damage != "missing":
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    output = resume(many.chain_recipe(folder, 30), chain)
    assert f"warning: damaged checkpoint: {path}: " in output and "resuming from step 24" in output
    assert losses(chain) == pytest.approx(losses(folder / "straight"), rel=1e-5)


def test_a_shard_that_the_manifest_lacks_is_named(chain):
    folder = chain / "checkpoints/step-00000030"
    (folder / "manifest.json").unlink()
    (folder / SHARDS[2]).unlink()
    Checkpoints._seal(folder, {})
    with pytest.raises(ValueError, match=f"{SHARDS[2]}: not in the manifest"):
        load(chain, checkpoint=30, device="cpu")


def test_a_checkpoint_that_one_process_cannot_write_is_one_error_of_all(found, folder):
    checkpoints = Checkpoints(folder / "failing")
    for rank in range(2):
        assert found[rank]["failing"] == {
            "error": f"checkpoint {checkpoints.path(2)} could not be written: No space left on device; "
            f"the last one is {checkpoints.path(1)}",
            "left": ["step-00000001"],
        }
    checkpoints.verify(1)
