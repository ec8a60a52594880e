"""Training on a GPU: resuming, compiled blocks, CUDA graphs, waits for the device."""

import os
import shutil
import signal
import warnings

import pytest
import torch

from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch
from fusedlm.model import build_model
from fusedlm.model.precision import autocast
from fusedlm.optim import ExponentialMovingAverage, build_optimizer
from fusedlm.runs.load import load
from fusedlm.runs.metrics import read_metrics
from fusedlm.train import train, trainer
from fusedlm.train.cuda_graph import CapturedBackward
from fusedlm.train.step import train_step
from tests.train.runs import checkpoint_names, losses, records, tiny_recipe

pytestmark = pytest.mark.gpu


def gpu_recipe(tmp_path, *overrides):
    return tiny_recipe(tmp_path, "runtime.device=cuda", "model.dim=64", "train.batch_size=8", *overrides)


RAMPS = "train.ramps=[{until: 0.25, seq_len: 4}, {until: 0.8, seq_len: 8, batch_size: 4}]"
GRAPH = ["runtime.cuda_graph=true", "data.document_mask=false"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["runtime.dtype=float32"],
        ["runtime.dtype=bfloat16"],
        ["runtime.dtype=bfloat16", *GRAPH],
        ["runtime.dtype=bfloat16", *GRAPH, "train.micro_batch_size=8", "runtime.compile=true"],
        ["runtime.dtype=bfloat16", *GRAPH, RAMPS, "runtime.compile=true", "train.swa={every: 1, below: 0.9}"],
    ],
)
def test_a_deterministic_run_resumes_bit_for_bit(tmp_path, monkeypatch, overrides):
    recipe = gpu_recipe(tmp_path, "runtime.deterministic=true", *overrides)
    train(recipe, tmp_path / "straight")
    train_step = trainer.train_step

    def interrupted(*arguments, **options):
        if len(losses(tmp_path / "run")) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert train(recipe, tmp_path / "run").step == 7
    monkeypatch.undo()
    train(recipe, tmp_path / "run", resume=True)
    assert records(tmp_path / "run") == records(tmp_path / "straight")
    assert checkpoint_names(tmp_path / "run")[-1] == "step-00000012"


def test_a_graph_is_captured_for_each_shape_of_a_ramp(tmp_path):
    common = ["model.dropout=0", "train.ema=null", "runtime.dtype=float32", "data.document_mask=false", RAMPS]
    for name in ("false", "true"):
        train(gpu_recipe(tmp_path, *common, f"runtime.cuda_graph={name}"), tmp_path / name)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)


def test_a_compiled_run_in_bfloat16_has_the_losses_of_the_plain_one(tmp_path):
    common = ["model.dropout=0", "train.steps=6", "runtime.dtype=bfloat16"]
    for name in ("false", "true"):
        train(gpu_recipe(tmp_path, *common, f"runtime.compile={name}"), tmp_path / name)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=0.02)
    first = read_metrics(tmp_path / "true" / "metrics.jsonl")[0][0]
    assert 0 < first["peak_memory_bytes"] < 1e9


@pytest.mark.parametrize("micro_batch_size", [2, 8])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_graph_gives_the_losses_of_the_passes_it_was_captured_from(tmp_path, micro_batch_size, compiled):
    common = ["model.dropout=0", "data.document_mask=false", "runtime.dtype=float32", f"runtime.compile={compiled}"]
    common.append(f"train.micro_batch_size={micro_batch_size}")
    train(gpu_recipe(tmp_path, *common), tmp_path / "plain")
    train(gpu_recipe(tmp_path, *common, "runtime.cuda_graph=true"), tmp_path / "graph")
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_each_replay_draws_new_random_numbers(tmp_path):
    """Dropout of the same batch, with weights that do not change."""
    recipe = gpu_recipe(tmp_path, "model.dropout=0.5")
    model = build_model(recipe.model, vocab_size=64, device="cuda").train()
    captured = CapturedBackward(model, lambda: autocast(torch.device("cuda"), torch.bfloat16), accumulates=False)
    tokens = torch.randint(64, (8, 16), device="cuda")
    loss_weight = torch.tensor(1 / tokens.numel(), dtype=torch.float64, device="cuda")

    def loss() -> float:
        return captured(tokens, tokens.roll(-1, 1), loss_weight, 1.0).losses["nll"].item()

    before = torch.cuda.get_rng_state()
    first = loss()
    gradient = model.embedding.weight.grad.clone()
    assert loss() != first and not torch.equal(gradient, model.embedding.weight.grad)
    torch.cuda.set_rng_state(before)
    assert loss() == first
    assert torch.equal(gradient, model.embedding.weight.grad)


EXPERTS = [
    f"model.blocks.{name}.ffn={{type: moe, n_experts: 8, top_k: 2, hidden: 64, bias_rate: 0.1, sequence_loss: 0.01}}"
    for name in "am"
]


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_experts_train_in_a_graph(tmp_path, compiled, micro_batch_size):
    """Losses, loads and biases are those of the plain passes: a warm-up or a capture counts nothing."""
    common = [*EXPERTS, "model.dropout=0", "data.document_mask=false", "runtime.dtype=bfloat16"]
    common += [f"train.micro_batch_size={micro_batch_size}", f"runtime.compile={compiled}"]
    for name in ("false", "true"):
        train(gpu_recipe(tmp_path, *common, f"runtime.cuda_graph={name}"), tmp_path / name)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-3)
    runs = [load(tmp_path / name, device="cpu")[0] for name in ("false", "true")]
    for block, other in zip(*(model.blocks[1:] for model in runs), strict=True):
        bias, expected = other.ffn.router.bias, block.ffn.router.bias
        # A selection that differs by rounding moves a bias by another step at most once or twice.
        assert expected.abs().max() > 0.1 and (bias - expected).abs().max() < 0.5
    first = [read_metrics(tmp_path / name / "metrics.jsonl")[0][0]["moe_layers"] for name in ("false", "true")]
    assert first[0] == first[1]


def test_experts_resume_bit_for_bit_in_a_graph(tmp_path):
    recipe = gpu_recipe(tmp_path, *EXPERTS, *GRAPH, "runtime.deterministic=true", "runtime.dtype=bfloat16")
    train(recipe, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other/checkpoints/step-00000012")
    train(recipe, tmp_path / "other", resume=True)
    assert records(tmp_path / "run") == records(tmp_path / "other")


@pytest.mark.parametrize("overrides", [[], EXPERTS], ids=["dense", "experts"])
def test_the_host_waits_for_the_device_once_a_step(tmp_path, overrides):
    recipe = gpu_recipe(tmp_path, *overrides)
    device = torch.device("cuda")
    model = build_model(recipe.model, vocab_size=64, device=device)
    optimizer = build_optimizer(model, AdamWConfig(), device)
    ema = ExponentialMovingAverage(model, 0.9)
    tokens = torch.randint(64, (8, 16), device=device)
    batch = Batch(tokens, tokens.roll(-1, 1), None, tokens.numel(), 8)

    def step():
        train_step(
            model,
            optimizer,
            batch,
            lr_scale=1.0,
            micro_batch_size=4,
            grad_clip=1.0,
            autocast=lambda: autocast(device, torch.bfloat16),
        )
        ema.update()

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits
