"""Several processes train as one does: losses, norms, weights, averages, scores; and runs that change their number."""

import json
import math
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
from tests.distributed.low_precision import LOW, LOW_LAYOUTS
from tests.distributed.steps import LENGTH, ROWS
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


@pytest.mark.parametrize(
    ("layout", "name"), CASES, ids=[f"{'x'.join(map(str, layout))} {name}" for layout, name in CASES]
)
def test_training_is_that_of_one_process(found, layout, name):
    ours, expected = found[0][layout][name], found[0][None][name]
    exact = not name.endswith("float32")
    assert ours["exact loss"] == pytest.approx(expected["exact loss"], rel=1e-12 if exact else 1e-5, abs=0)
    assert len(set(expected["exact loss"])) == many.CASES[name][2], "the steps moved nothing"
    assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6 if exact else 1e-4, abs=0)
    # Averages are float32. Of rounded weights: a code may be another one where the float is on the edge.
    bounds = (1e-12, 1e-7, 1e-12, 1e-4) if exact else (1e-5, 1e-5, 1e-5, 1e-3)
    for nll, other, bound in zip(ours["nll"], expected["nll"], bounds, strict=True):
        assert nll == pytest.approx(other, rel=bound, abs=0)
    for a, b in zip(ours["layer losses"], expected["layer losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-6 if exact else 1e-4, abs=0)
    for a, b in zip(ours["metrics"], expected["metrics"], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-12 if exact else 1e-6, atol=0)
    assert ours["tensors"].keys() == expected["tensors"].keys()
    for key, value in ours["tensors"].items():
        bound = 1e-6 if key.startswith("ema ") else 1e-9
        assert_close(value, expected["tensors"][key], bound if exact else 1e-4, key)


def test_every_process_has_the_same_numbers(found):
    for layout, name in CASES:
        for rank in range(1, math.prod(layout)):
            for key in ("loss", "grad_norm", "nll"):
                assert found[rank][layout][name][key] == found[0][layout][name][key], (layout, name, key)


@pytest.mark.parametrize("layout", LOW_LAYOUTS, ids=str)
def test_products_in_8_bits_are_those_of_one_process(found, layout):
    for ours, expected, case in zip(found[0]["low", layout], found[0]["low", None], LOW, strict=True):
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-9, abs=0), case
        assert ours["compiled"][0] == pytest.approx(ours["losses"], rel=1e-9, abs=0), case
        # Of three micro-batches the first alone casts weights: they are gathered for each.
        assert ours["casts"] == ours["compiled"][1] == [ours["layers"]] * 3 == expected["casts"], case
    losses = [case["losses"][1:] for case in found[0]["low", layout]]
    assert len({tuple(case) for case in losses}) == len(LOW)


def test_divided_experts_keep_the_backends_that_were_chosen_before(found):
    assert found[0]["backends"] == many.BACKENDS


def test_all_processes_train_the_same_layers_in_8_bits(found):
    assert found[0]["chosen"] == found[1]["chosen"] != []


def test_a_run_in_8_bits_is_that_of_one_process(folder):
    """Up to micro-batches of other sequences, whose gradients have scales of their own."""
    one, two = (losses(folder / f"fp8 {size}") for size in (1, 2))
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two == pytest.approx(one, rel=1e-3)
    first = [records(folder / f"fp8 {size}")[0] for size in (1, 2)]
    assert all(record["outlier_share"] > 0 for record in first)


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(found):
    for rank in range(2):
        assert found[rank]["skipped"] == {"skipped": [True, False], "unchanged": True}


def test_kernels_update_shards_as_plain_pytorch_does_and_skip_steps_without_the_host(found):
    # The third step has gradients at weights that differ by rounding, and AdamW divides them by their size.
    bounds = (1e-5, 1e-5, 1e-3)
    for plain, fused in found[0]["updated"]:
        for before, after, bound in zip(plain, fused, bounds, strict=True):
            assert after.keys() == before.keys()
            for name, value in before.items():
                assert_close(after[name], value, bound, name)
        for state in (plain, fused):
            assert all(torch.equal(value, state[1][name]) for name, value in state[0].items()), "skipped"
            moved = [name for name, value in state[1].items() if not torch.equal(value, state[2][name])]
            assert len(moved) > 10 and any(name.startswith("row_square/") for name in moved)


def test_weights_are_gathered_once_a_step_or_for_every_pass(found):
    """By two blocks and the rest of the model, in three micro-batches; the rest is kept from one pass to the next."""
    assert found[0]["gathers"] == {2: [3, 3], 3: [3 * (2 + 2 + 1)] * 2}


def test_compiled_blocks_give_the_same_losses(found):
    for ((eager, compiled), n_graphs, n_symbols), least in zip(found[0]["compiled"], (3, 3, 5), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-5) and len(set(eager)) == 3
        assert n_graphs >= least, "one per block, four around divided experts, and one for the head"
        assert n_symbols == 0


def test_a_resumed_run_with_dropout_draws_what_an_uninterrupted_one_does(found):
    whole, halves = found[0]["dropped out"]
    assert len(whole) == 4 and halves == whole, "bit for bit"


def test_a_signal_to_one_process_stops_all_at_the_same_step(found, folder):
    for rank in range(2):
        # Three blocks and the rest of the model, once a step.
        assert found[rank]["stopped"] == {"step": 3, "signal": signal.SIGTERM, "gathers": [4, 4, 4]}
    assert Checkpoints(folder / "stopped/checkpoints").steps() == [3]


def test_every_process_refuses_what_cannot_be(found):
    for rank in range(2):
        errors = found[rank]["refused"]
        assert errors["batch"].startswith("train.batch_size=9: must be a multiple of the 2 processes")
        assert "shard=3 needs 3 processes, and this run has 2" in errors["layout"]
        assert "replicate=3, shard=null needs a multiple of 3 processes" in errors["copies"]
        assert "chain plain already holds a run" in errors["occupied"]  # known to the main process alone


def _numbers(figure: float | list) -> list[float]:
    return torch.tensor(figure, dtype=torch.float64).flatten().tolist()


@pytest.mark.parametrize("name", many.CHAINS)
def test_a_run_continued_by_other_numbers_of_processes_is_an_uninterrupted_one(folder, name):
    steps = {kind: [r for r in records(folder / f"{kind} {name}") if "loss" in r] for kind in ("straight", "chain")}
    last = many.CHAINS[name][1][-1][0]
    assert [r["step"] for r in steps["chain"]] == list(range(1, last + 1))
    for a, b in zip(steps["chain"], steps["straight"], strict=True):
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    scores = {
        kind: {r["step"]: r for r in records(folder / f"{kind} {name}") if "val_bpb" in r} for kind in steps
    }
    assert scores["straight"].keys() == {*range(10, last, 10), last}
    for step in scores["straight"]:
        a, b = scores["chain"][step], scores["straight"][step]
        assert a.keys() == b.keys() and "val_bpb_ema" in a
        for key in a:
            assert _numbers(a[key]) == pytest.approx(_numbers(b[key]), rel=1e-5), key


@pytest.mark.parametrize("name", many.EXACT_CASES)
def test_resumed_by_4_2_1_and_3_processes_losses_are_exact(found, name):
    """In float64, through checkpoints in shards."""
    chain = [loss for part in found[0]["exact chain"] for loss in part[name]]
    expected = found[0][None][name]["exact loss"]
    assert len(chain) == len(expected) == 30 and chain == pytest.approx(expected, rel=1e-12, abs=0)


def shards(size: int) -> list[str]:
    stems = ("model", "optimizer", "ema")
    return [f"{stem}.shard-{n + 1:05d}-of-{size:05d}.safetensors" for stem in stems for n in range(size)]


SHARDS = shards(3)
OTHERS = ["rng.safetensors", "state.json", "recipe.yaml"]


@pytest.mark.parametrize("name", many.CHAINS)
def test_the_checkpoint_has_the_content_of_one_process(folder, name):
    chain, straight = (Checkpoints(folder / f"{kind} {name}" / "checkpoints") for kind in ("chain", "straight"))
    last, size, _ = many.CHAINS[name][1][-1]
    assert chain.steps()[-1] == last and set(chain.files(last)) == {*shards(size), *OTHERS}
    chain.verify(last)
    sizes = [chain.files(last)[file]["bytes"] for file in shards(size) if file.startswith("optimizer")]
    assert max(sizes) < 1.5 * sum(sizes) / size, "of the optimizer state, which is divided"
    for stem in ("model", "optimizer", "ema"):
        a, b = chain.read_tensors(last, stem), straight.read_tensors(last, stem)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert_close(a[key], b[key], 1e-3, f"{stem} {key}")
    state = chain.read_json(last, "state.json")
    assert state["next_sample"] == straight.read_json(last, "state.json")["next_sample"] == last * 12
    if name == "plain":
        parallel = load_recipe(folder / "chain plain/recipe.yaml").runtime.parallel
        assert parallel.shard is None, "the recipe does not depend on the number of processes"
    environment = json.loads((folder / f"chain {name}/environment.json").read_text())
    assert environment["processes"] == many.CHAINS[name][1][-1][1]


@pytest.mark.parametrize("layout", list(many.EXACT_CHAIN))
def test_copies_of_a_shard_divide_what_they_write(folder, layout):
    checkpoints, step = Checkpoints(folder / "exact normuon 1"), many.EXACT_CHAIN[layout]
    names, n = checkpoints.table_files(step, "optimizer"), 1 if layout is None else layout[0] * layout[1]
    sizes = [checkpoints.files(step)[name]["bytes"] for name in names]
    assert len(sizes) == n and max(sizes) < 1.6 * sum(sizes) / n


@pytest.fixture
def chain(folder, tmp_path):
    """A copy of the run whose last checkpoint is of three processes."""
    return shutil.copytree(folder / "chain plain", tmp_path / "chain")


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
    assert losses(chain) == pytest.approx(losses(folder / "straight plain"), rel=1e-5)


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


def test_all_tokens_on_one_expert_leave_three_processes_without_any(found):
    for metrics in found[0][1, 1, 4]["experts skewed"]["metrics"]:
        assert metrics["moe"].tolist() == [[0, 0, 0, ROWS * LENGTH]]


def test_rows_go_to_their_process_and_gradients_come_back(found):
    for rank in range(4):
        ours = found[rank]["exchanged"]
        expected = [[sender, rank, n] for sender in range(4) for n in range(many.SENT[sender][rank])]
        assert ours["there"].tolist() == expected and ours["unchanged"]
        assert torch.equal(ours["gradient"], (ours["to"] + 1).expand(-1, 3))
