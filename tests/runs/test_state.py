"""The content of checkpoints: tensors by name and state.json."""

import json
from dataclasses import asdict

import pytest
import torch

from fusedlm.config.train import AdamWConfig, TrainConfig
from fusedlm.distributed import World
from fusedlm.optim import Averages, build_optimizer, optimizer_tensors
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint, ForeignCheckpoint
from fusedlm.runs.state import (
    TrainState,
    examine,
    load_model_tensors,
    model_tensors,
    read_state,
    restore_state,
    save_state,
)
from fusedlm.runs.writer import CheckpointWriter
from fusedlm.testing import part_model
from tests.runs.edits import edit_state
from tests.train.runs import tiny_recipe

CPU = torch.device("cpu")
MIXER = "{type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}"


def parts(seed: int):
    torch.manual_seed(seed)
    model = part_model(MIXER)
    optimizer = build_optimizer(model, AdamWConfig(lr=0.01), CPU)
    return model, optimizer, Averages(model, TrainConfig(steps=10, seq_len=4, batch_size=1, ema=0.9))


def step(model, optimizer, averages) -> None:
    tokens = torch.randint(61, (2, 6))
    model(tokens, targets=tokens).total().backward()
    optimizer.step()
    optimizer.zero_grad()
    averages.update(0)


def written(checkpoints, state, recipe, *objects) -> None:
    writer = CheckpointWriter(checkpoints, World(), keep=9, in_background=False, device=CPU)
    save_state(writer, state, recipe, *objects, CPU)


def everything(model, optimizer, averages) -> dict[str, torch.Tensor]:
    averages = {f"ema/{name}": average for name, average in averages.ema.state_dict().items()}
    found = model_tensors(model) | optimizer_tensors(model, optimizer) | averages
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def test_restored_objects_continue_bit_for_bit(tmp_path):
    recipe, checkpoints = tiny_recipe(tmp_path), Checkpoints(tmp_path / "checkpoints")
    straight = parts(seed=0)
    for _ in range(2):
        step(*straight)
    state = TrainState(data="abc", step=2, next_sample=8, skipped=1, ema_updates=2, val_bpb=1.5, best_step=2)
    written(checkpoints, state, recipe, *straight)
    assert all(part.numel() > 0 for part in checkpoints.read_tensors(2, "rng").values())
    step(*straight)
    resumed = parts(seed=1)
    assert restore_state(checkpoints, 2, *resumed, CPU) == state
    step(*resumed)  # the tokens of this step come from the restored RNG
    expected, actual = everything(*straight), everything(*resumed)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_tied_weight_is_saved_once_and_constants_are_saved():
    names = set(model_tensors(part_model(MIXER)))
    assert "embedding.weight" in names and "head.weight" not in names
    assert "blocks.1.mixer.noise_weight.start" in names


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_of_another_model_are_refused(change):
    model = part_model(MIXER)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in model_tensors(model).items()}
    if change == "missing":
        del tensors["embedding.weight"]
    elif change == "extra":
        tensors["other.weight"] = torch.zeros(2)
    else:
        tensors["embedding.weight"] = torch.zeros(3, 32)
    messages = {
        "missing": "here: tensor 'embedding.weight' is in only one of the checkpoint and the model",
        "extra": "here: tensor 'other.weight' is in only one of the checkpoint and the model",
        "shape": r"here: tensor 'embedding.weight' has shape \(3, 32\), in the model of the recipe \(64, 32\)",
    }
    with pytest.raises(ValueError, match=messages[change]):
        load_model_tensors(model, tensors, "here")


@pytest.mark.parametrize("name, problem", [("moons", "unknown to this version"), ("step", "missing")])
def test_the_state_of_another_version_is_refused(tmp_path, name, problem):
    fields = asdict(TrainState("abc"))
    if problem == "missing":
        del fields[name]
    else:
        fields[name] = 1
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, {"state.json": json.dumps(fields)})
    with pytest.raises(ValueError, match=f"state.json: field '{name}' is {problem}; start a new run with --out"):
        read_state(checkpoints, 1)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of step 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = TrainState(data="abc", step=2, val_bpb=float("inf"), run="a" * 32, tokenizer="b", metrics="c")
    written(checkpoints, state, tiny_recipe(tmp_path), *parts(0))
    return checkpoints, state


def test_a_checkpoint_of_this_run_is_accepted(saved):
    checkpoints, state = saved
    assert examine(checkpoints, 2) == examine(checkpoints, 2, "a" * 32) == state
    with pytest.raises(ForeignCheckpoint, match=r"-00000002 is of another run \(aaaaaaaaaaaa, this is bbbbbbbbbbbb\)"):
        examine(checkpoints, 2, "b" * 32)
    edit_state(checkpoints.directory.parent, 2, run=..., tokenizer=..., metrics=...)
    earlier = examine(checkpoints, 2, "b" * 32)
    assert (earlier.run, earlier.tokenizer, earlier.metrics) == (None, None, None)


def test_a_checkpoint_under_another_name_is_foreign(saved):
    checkpoints, _ = saved
    checkpoints.path(2).rename(checkpoints.path(3))
    with pytest.raises(ForeignCheckpoint, match="step-00000003 holds step 2; rename it to its step"):
        examine(checkpoints, 3)


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"step": None}, {"data": 1}, {"val_bpb": []}, {"best_step": 1.5}, {"run": {}}, {"skipped": -1}],
)
def test_values_that_are_never_written_are_damage(saved, change):
    checkpoints, _ = saved
    edit_state(checkpoints.directory.parent, 2, **change)
    with pytest.raises(DamagedCheckpoint, match=f"state.json: {next(iter(change))}=.* is never written"):
        examine(checkpoints, 2)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "recipe.yaml"])
def test_a_checkpoint_without_a_file_that_every_one_has_is_damaged(saved, name):
    checkpoints, _ = saved
    (checkpoints.path(2) / name).unlink()
    (checkpoints.path(2) / "manifest.json").unlink()
    checkpoints._seal(checkpoints.path(2), {})
    with pytest.raises(DamagedCheckpoint, match=f"{name}: not in the manifest"):
        examine(checkpoints, 2)
