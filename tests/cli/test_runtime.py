"""The runtime of a command: dtype and backends by override, and runs whose backends do not exist on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedlm.data import prepare
from fusedlm.evaluate import score_documents
from fusedlm.model import Decoder
from fusedlm.ops.common.dispatch import recorded
from fusedlm.runs import load
from tests.runs.edits import edit_recipe

RUN = "runs/small"
CUDNN = "runtime.backends.attention=cudnn"
EXPERIMENT = """
name: pair
base: runs/small/recipe.yaml
variants: {same: [], narrow: [model.blocks.m.ffn.hidden=24]}
decode_lengths: [20]
"""


@pytest.fixture
def randomised(workspace: Path, monkeypatch) -> Path:
    """The finished run with logits that are not all close to zero, so that rounding shows."""
    from safetensors.torch import load_file, save_file

    path = next(Path(RUN, "checkpoints").glob("*2/model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in load_file(path).items()}
    save_file(tensors, path)
    monkeypatch.setattr("fusedlm.runs.checkpoint.Checkpoints.verify", lambda *arguments, **options: None)
    return workspace


@pytest.mark.parametrize("window", [16, None])
def test_eval_scores_in_the_dtype_of_the_override(randomised: Path, fusedlm, window):
    model, _, recipe = load(RUN, device="cpu")
    shards = prepare(recipe.data).validation
    found = {}
    for name in ("float32", "bfloat16"):
        options = ("--device", "cpu", "--window", window or 0, "--json")
        result = json.loads(fusedlm("eval", RUN, f"runtime.dtype={name}", *options).out)
        expected = score_documents(model, shards.documents(), window=window, device="cpu", dtype=getattr(torch, name))
        assert (result["bpb"], result["dtype"]) == (expected.bpb, name)
        found[name] = result["bpb"]
    assert abs(found["bfloat16"] - found["float32"]) > 1e-5
    default = json.loads(fusedlm("eval", RUN, "--device", "cpu", "--window", window or 0, "--json").out)
    assert default["bpb"] == found["float32"]


def test_generate_decodes_in_the_dtype_of_the_override(randomised: Path, fusedlm, monkeypatch):
    """Logits under autocast are bfloat16 numbers; those in float32 are not."""
    logits, forward = [], Decoder.forward

    def record(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        logits.append(output.logits)
        return output

    monkeypatch.setattr(Decoder, "forward", record)
    for name, rounded in (("float32", False), ("bfloat16", True)):
        logits.clear()
        outcome = fusedlm("generate", RUN, "--prompt", "Doc", "--max-tokens", 3, f"runtime.dtype={name}")
        assert outcome.code == 0, outcome.err
        assert len(logits) == 3
        assert all(torch.equal(step, step.bfloat16().float()) == rounded for step in logits)


@pytest.mark.parametrize(
    "command",
    [
        ("eval", RUN),
        ("eval", RUN, "--window", 0),
        ("generate", RUN, "--prompt", "Document", "--max-tokens", 2),
        ("eval", RUN, "--probe", "extend"),
        ("eval", RUN, "--probe", "mqar", "--steps", 1, "--pairs", 2, "--samples", 1),
    ],
    ids=["eval", "eval full documents", "generate", "extend", "mqar"],
)
def test_the_backend_of_the_override_runs(workspace: Path, fusedlm, command):
    def backends(*overrides) -> set[str]:
        with recorded() as calls:
            outcome = fusedlm(*command, "--device", "cpu", *overrides)
        assert outcome.code == 0, outcome.err
        return {backend for op, backend, _ in calls if op == "attention"}

    default = backends()
    assert backends("runtime.backends.attention=reference") == {"reference"} != default
    assert default == {"sdpa"}


@pytest.fixture
def trained_with_cudnn(workspace: Path) -> Path:
    """A finished run whose recipe names a backend that the CPU does not have."""
    edit_recipe(Path(RUN), lambda text: text.replace("backends: {}", "backends: {attention: cudnn}"))
    Path("pair.yaml").write_text(EXPERIMENT)
    return workspace


def test_a_run_with_backends_of_another_machine_can_be_planned(trained_with_cudnn: Path, fusedlm, caplog):
    for command in (
        ("plan", f"{RUN}/recipe.yaml"),
        ("train", f"{RUN}/recipe.yaml", "--dry-run"),
        ("compare", "pair.yaml", "--dry-run"),
    ):
        outcome = fusedlm(*command)
        assert (outcome.code, outcome.err) == (0, ""), command
    assert not caplog.records


def test_a_run_with_backends_of_another_machine_scores_as_with_those_of_this_one(
    trained_with_cudnn: Path, fusedlm, caplog
):
    with recorded() as calls:
        replaced = fusedlm("eval", RUN, "--device", "cpu", "--json")
    assert {backend for op, backend, _ in calls if op == "attention"} == {"sdpa"}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert CUDNN in warning and "auto is used" in warning
    caplog.clear()
    named = fusedlm("eval", RUN, "runtime.backends={attention: sdpa}", "--device", "cpu", "--json")
    assert json.loads(replaced.out) == json.loads(named.out) and not caplog.records


def test_backends_of_another_machine_are_one_warning_on_stderr(trained_with_cudnn: Path):
    commands = [
        ["eval", RUN, "--device", "cpu"],
        ["generate", RUN, "--prompt", "a", "--device", "cpu"],
        ["compare", "pair.yaml"],
    ]
    code = """
import json, sys
import fusedlm.compare.report
from fusedlm.cli import main
fusedlm.compare.report.draw_plots = lambda results: []  # which take longer than the rest
sys.exit(max(map(main, json.loads(sys.argv[1]))))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "cudnn" in line]
    assert lines == [f"warning: {CUDNN}: cannot run here (needs a CUDA device, not cpu); auto is used"] * len(commands)
    assert "Traceback" not in done.stderr
    assert "narrow against same: validation loss" in done.stdout
