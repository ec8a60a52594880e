"""Ramps of batch size and sequence length: true tokens, and resuming in the middle, with every average."""

import shutil

import pytest
import torch

from fusedlm.config import parse_recipe
from fusedlm.model import Decoder
from fusedlm.model.accounting import training_flops_per_token
from fusedlm.runs import load
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.metrics import read_metrics
from fusedlm.train import speed, train, trainer
from fusedlm.train.step import train_step
from tests.config.test_recipe import SMALL
from tests.train.runs import assert_same_run, records, tiny_recipe

# Steps 1 to 3 have 8 x 4 tokens, 4 to 6 have 2 x 8, the others 4 x 16, in micro-batches of at most 32 tokens.
RAMPS = "train.ramps=[{until: 0.25, seq_len: 4, batch_size: 8}, {until: 0.5, seq_len: 8, batch_size: 2}]"
KEYS = [
    RAMPS,
    "train.schedule={type: linear, warmup: 0.1, final: 0}",
    "train.swa={every: 2, below: 0.6}",
    "train.checkpoint_every=5",
    "train.keep_checkpoints=3",
]


@pytest.fixture(scope="module")
def ramped(tmp_path_factory):
    """(folder, recipe, run, shapes of every step as (tokens, micro-batch))."""
    folder = tmp_path_factory.mktemp("ramped")
    recipe, seen = tiny_recipe(folder, *KEYS), []

    def watched(model, optimizer, batch, **options):
        seen.append((tuple(batch.tokens.shape), options["micro_batch_size"]))
        return train_step(model, optimizer, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", watched)
        patch.setattr(speed, "peak_flops", lambda device: 1e9)
        train(recipe, folder / "run")
    return folder, recipe, folder / "run", seen


def test_steps_have_the_shapes_of_the_ramps_and_metrics_count_true_tokens(ramped):
    _, recipe, run, seen = ramped
    assert seen == [((8, 4), 8)] * 3 + [((2, 8), 2)] * 3 + [((4, 16), 2)] * 6
    per_step = [32] * 3 + [16] * 3 + [64] * 6
    steps = [record for record in records(run) if "loss" in record]
    assert [record["tokens"] for record in steps] == [sum(per_step[: i + 1]) for i in range(12)]
    assert recipe.train.total_tokens() == sum(per_step) == steps[-1]["tokens"]
    state = Checkpoints(run / "checkpoints").read_json(12, "state.json")
    assert state["next_sample"] * 16 == sum(per_step)
    model, _, _ = load(run, device="cpu")
    flops = {n: training_flops_per_token(model, n) for n in (4, 8, 16)}
    timed = [record for record in read_metrics(run / "metrics.jsonl")[0] if "loss" in record]
    for record, (shape, _) in zip(timed, seen, strict=True):
        rate = shape[0] * shape[1] / record["step_seconds"]
        assert record["tokens_per_second"] == pytest.approx(rate)
        assert record["mfu"] == pytest.approx(rate * flops[shape[1]] / 1e9)


@pytest.mark.parametrize("step", [5, 10])
def test_a_run_resumed_in_a_ramp_and_in_the_average_equals_an_uninterrupted_one(ramped, tmp_path, step):
    """With EMA and SWA at once: step 5 is in the second ramp, 10 after the SWA has begun."""
    _, recipe, straight, _ = ramped
    run = shutil.copytree(straight, tmp_path / "run")
    for later in Checkpoints(run / "checkpoints").steps():
        if later > step:
            shutil.rmtree(run / f"checkpoints/step-{later:08d}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "peak_flops", lambda device: 1e9)
        train(recipe, run, resume=True)
    assert_same_run(run, straight)
    files = [Checkpoints(one / "checkpoints").files(12)["swa.safetensors"] for one in (run, straight)]
    assert files[0] == files[1]


def test_every_average_is_loaded_by_its_name_and_scores_as_in_training(ramped):
    _, _, run, _ = ramped
    weights = {name: load(run, weights=name, device="cpu")[0].embedding.weight for name in ("raw", "ema", "swa")}
    saved = {
        name: Checkpoints(run / "checkpoints").read_tensors(12, name)["embedding.weight"] for name in ("ema", "swa")
    }
    assert torch.equal(weights["ema"], saved["ema"]) and torch.equal(weights["swa"], saved["swa"])
    assert len({tuple(tensor.flatten()[:4].tolist()) for tensor in weights.values()}) == 3
    last = records(run)[-1]
    assert len({last[key] for key in ("val_bpb", "val_bpb_ema", "val_bpb_swa")}) == 3
    state = Checkpoints(run / "checkpoints").read_json(12, "state.json")
    assert (state["ema_updates"], state["swa_updates"]) == (12, 4)  # of steps 6, 8, 10 and 12


@pytest.mark.parametrize(("ramps", "dynamic"), [("[]", None), ("[{until: 0.5, seq_len: 8}]", False)])
def test_blocks_are_compiled_for_each_shape_of_a_ramp(tmp_path, monkeypatch, ramps, dynamic):
    class Compiled(Exception):
        pass

    def compile_blocks(self, **options):
        assert options == {"dynamic": dynamic}
        raise Compiled

    monkeypatch.setattr(Decoder, "compile_blocks", compile_blocks)
    with pytest.raises(Compiled):
        train(tiny_recipe(tmp_path, "runtime.compile=true", f"train.ramps={ramps}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("ramps", "message"),
    [
        ("[{until: 0.5, seq_len: 5}]", "train: ramps.0.seq_len=5: must divide seq_len=16"),
        (
            "[{until: 0.5, seq_len: 2}]",
            "train: ramps.0: batch_size=4 of seq_len=2 must be whole windows of 16 tokens; give a batch_size that is a "
            "multiple of 8",
        ),
        ("[{until: 0.5}, {until: 0.5}]", "train: ramps: until=[0.5, 0.5] must be increasing"),
        (
            "[{until: 0.5, batch_size: 16777216}]",
            "train: ramps.0: a step has at most 268435456 tokens, not 16777216 x 16",
        ),
    ],
)
def test_ramps_that_cannot_be_are_refused_in_one_line(ramps, message):
    overrides = [f"train.ramps={ramps}"]
    if "16777216" in ramps:
        overrides.append("train.seq_len=32")
        message = message.replace("x 16", "x 32")
    with pytest.raises(ValueError) as caught:
        parse_recipe(SMALL, overrides)
    assert str(caught.value) == message
