"""Runs with `runtime.precision`: they learn as in float32, resume bit for bit, and say what they compute in 8 bits."""

import io
import os
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fusedlm.config import load_recipe, parse_recipe
from fusedlm.model import Decoder
from fusedlm.nn.low_precision import LowPrecisionLinear, low_precision_layers
from fusedlm.ops.low_precision.cost import Rates
from fusedlm.runs.load import load
from fusedlm.train import train, trainer
from tests.train.runs import SHORT, assert_same_run, losses, records, short_losses, tiny_recipe

FP8 = "runtime.precision=fp8"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fp8_losses(tmp_path_factory):
    return short_losses(tmp_path_factory.mktemp("fp8"), FP8)


def test_precision_changes_the_losses(fp8_losses, tmp_path):
    assert short_losses(tmp_path) != fp8_losses


@pytest.mark.parametrize(
    "override",
    ["scales=tensor", "gradients=e5m2", "outliers=3.5", "{outliers: 0.1, outlier_columns: 2}", "exclude=['*.qkv']"],
)
def test_every_key_changes_the_losses(fp8_losses, tmp_path, override):
    prefix = "runtime.low_precision=" if override.startswith("{") else "runtime.low_precision."
    assert short_losses(tmp_path, FP8, prefix + override) != fp8_losses


def test_auto_leaves_layers_that_would_be_slower(fp8_losses, tmp_path, monkeypatch):
    """On a device whose rates are known, with layers as narrow as these."""
    rates = Rates(3e12, ((2048.0, {"bf16": 6.5e14, "fp8 tensor": 1.1e15, "fp8 row": 1.2e15}),), "test")
    monkeypatch.setattr("fusedlm.runs.precision.rates_of", lambda device: rates)
    for name in ("auto", "all", "slow", "none"):
        (tmp_path / name).mkdir()
    auto = short_losses(tmp_path / "auto", FP8)
    assert auto == short_losses(tmp_path / "none") != fp8_losses
    assert short_losses(tmp_path / "all", FP8, "runtime.low_precision.layers=all") == fp8_losses
    assert short_losses(tmp_path / "slow", FP8, "runtime.low_precision.least_speedup=0.01") == fp8_losses


@pytest.mark.parametrize("precision", ["int8", "mxfp8"])
def test_formats_differ(fp8_losses, tmp_path, precision):
    assert short_losses(tmp_path, f"runtime.precision={precision}") != fp8_losses


def test_learns_real_text_as_in_float32(tmp_path):
    """Forty steps on our licence: the loss falls by more than a nat, and those of 8 bits stay within 1% of it."""
    text = REPOSITORY / "LICENSE"
    recipe = """
name: licence
model:
  dim: 32
  n_layers: 2
  pattern: a
  blocks: {a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu, hidden: 64}}}
train: {steps: 40, seq_len: 32, batch_size: 8, optimizer: {type: adamw, lr: 0.02}, eval_tokens: 64, checkpoint_every: 0}
runtime: {device: cpu}
"""
    source = f"data.source={{type: text, path: {text}}}"
    overrides = [source, f"data.dir={tmp_path / 'prepared'}", "data.split={type: tail, fraction: 0.1}"]
    ends = {}
    for precision in ("none", "fp8", "int8"):
        run = tmp_path / precision
        train(parse_recipe(recipe, [*overrides, f"runtime.precision={precision}"]), run)
        found = losses(run)
        ends[precision] = sum(found[-10:]) / 10
        assert found[0] - ends[precision] > 1.0
    for precision in ("fp8", "int8"):
        assert 0 < abs(ends[precision] - ends["none"]) < 0.01 * ends["none"], ends


def test_a_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, FP8, "runtime.low_precision.outliers=3.5")
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
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    shares = [record["outlier_share"] for record in records(tmp_path / "run") if "loss" in record]
    assert len(shares) == 12 and all(0 <= share < 1 for share in shares) and any(shares)
    assert not low_precision_layers(load(tmp_path / "run")[0])


def test_weights_are_cast_once_per_optimizer_step(tmp_path, monkeypatch):
    """Not once per micro-batch, of which a step has two."""
    casts = []
    cast = LowPrecisionLinear.cast_weight
    monkeypatch.setattr(LowPrecisionLinear, "cast_weight", lambda layer: casts.append(layer) or cast(layer))
    train(tiny_recipe(tmp_path, *SHORT, FP8), tmp_path / "run")
    assert len(casts) == 3 * len(set(casts)) and len(set(casts)) == 12


def test_a_compiled_run(tmp_path, fp8_losses, monkeypatch):
    """One full graph per block, forward and backward, with mixers that are recomputed."""
    monkeypatch.setattr(Decoder, "compile_blocks", partialmethod(Decoder.compile_blocks, "aot_eager"))
    for name in ("compiled", "plain"):
        (tmp_path / name).mkdir()
    shared = FP8, "model.dropout=0", "model.n_layers=1", "model.pattern=a"
    found = short_losses(tmp_path / "compiled", *shared, "runtime.compile=true", "runtime.recompute=mixer")
    plain = short_losses(tmp_path / "plain", *shared)
    assert found == pytest.approx(plain, rel=1e-6)


def test_what_is_printed_and_recorded(tmp_path):
    output = io.StringIO()
    train(tiny_recipe(tmp_path, *SHORT, FP8), tmp_path / "run", console=Console(file=output, width=200))
    text = output.getvalue()
    assert "precision: fp8, one scale per row, emulated, in 12 of 16 hidden matrices" in text
    assert "blocks.*.ffn.gate_up  16 -> 64  x2    8 bits" in text
    assert "blocks.*.mixer.gates  16 -> 4   x1    no: needs widths that are multiples of 16, not 16 and 4" in text
    environment = (tmp_path / "run" / "environment.json").read_text()
    assert '"a.low_precision_linear": "reference"' in environment
    assert load_recipe(tmp_path / "run" / "recipe.yaml").runtime.precision == "fp8"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime.low_precision.scales=tensor"], "has no effect with runtime.precision=none"),
        (["runtime.precision=int8", "runtime.low_precision.gradients=e5m2"], "gradients are int8"),
        ([FP8, "runtime.low_precision.outlier_columns=16"], "outlier_columns=16: has no effect without"),
        ([FP8, "runtime.low_precision.outliers=0"], "outliers: got 0, input should be greater than 0"),
        ([FP8, "runtime.low_precision.exclude=[layers.0.*]"], "exclude=layers.0.*: fits no hidden matrix"),
        (["runtime.precision=fp4"], "runtime.precision: got 'fp4', input should be"),
    ],
)
def test_bad_input(tmp_path, overrides, message):
    with pytest.raises(ValueError) as caught:
        train(tiny_recipe(tmp_path, *SHORT, *overrides), tmp_path / "run")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "int8", "mxfp8"])
def test_a_graph_trains_as_separate_launches(tmp_path, precision):
    """Compiled, in two micro-batches per step, with weights that are cast outside of the graph."""
    options = [
        "runtime.device=cuda", "runtime.dtype=bfloat16", "data.document_mask=false", "runtime.deterministic=true",
        f"runtime.precision={precision}", "runtime.low_precision.layers=all", "runtime.low_precision.outliers=3.5",
        "model.dim=64", "model.dropout=0", "train.batch_size=8", "runtime.compile=true", "train.micro_batch_size=4",
    ]  # fmt: skip
    train(tiny_recipe(tmp_path, *options), tmp_path / "plain")
    train(tiny_recipe(tmp_path, *options, "runtime.cuda_graph=true"), tmp_path / "graph")
    plain, graph = losses(tmp_path / "plain"), losses(tmp_path / "graph")
    assert graph == pytest.approx(plain, rel=2e-3) and torch.tensor(graph).isfinite().all()
    train(tiny_recipe(tmp_path, *options[:4], *options[7:]), tmp_path / "bf16")
    assert losses(tmp_path / "bf16") != plain
    assert plain == pytest.approx(losses(tmp_path / "bf16"), rel=0.02)
