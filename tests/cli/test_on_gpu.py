"""Commands on a GPU: each runs, and its figures are those of the CPU."""

import json
import math
import shutil
from pathlib import Path

import pytest

RUN = "runs/small"
DEVICE = "cuda"
pytestmark = pytest.mark.gpu
EVALUATIONS = {
    "plain": "",
    "sliding": "--stride 4",
    "full documents": "--window 0",
    "across documents": "--across-documents",
    "ngram": "--adapt ngram",
    "tilt": "--adapt tilt",
    "finetune": "--adapt finetune --adapt-lr 0.01 --adapt-chunk 32",
    "low rank": "--adapt finetune --adapt-parameters low_rank --adapt-rank 2",
    "yarn": "--yarn 2",
}
QUANTISATIONS = {
    "mxfp4": "--format mxfp4",
    "mxfp4, gptq": "--format mxfp4 --calibrate gptq --tokens 256",
    "int4": "--format int4",
    "fp8": "--format fp8",
    "int8, gptq-lite": "--format int8 --calibrate gptq-lite --tokens 256",
    "int6": "--format int6 --calibrate gptq --tokens 256",
    "int3, corrected": "--format int3 --calibrate gptq --rank 2 --tokens 256",
    "mixed": "--format mixed --calibrate gptq --budget 11000 --tokens 256",
    "coded": "--format coded --calibrate gptq --budget 11000 --tokens 256",
}
PROBES = {
    "mqar": "--probe mqar --steps 2 --samples 8 --pairs 4",
    "needle": "--probe needle --samples 2 --lengths 8,16 --text long.txt",
    "extend": "--probe extend --samples 2 --factors 2 --text long.txt",
}


@pytest.fixture
def run(fusedlm, workspace):
    """run("eval", ...) of a device -> what it printed as JSON."""
    text = Path("text.txt").read_text(encoding="utf-8").replace("---", "")
    Path("long.txt").write_text(20 * text, encoding="utf-8")  # one document

    def run(device: str, *arguments) -> dict:
        outcome = fusedlm(*arguments, *(["--device", device] if device else []), "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out.splitlines()[-1])

    return run


@pytest.mark.parametrize("options", EVALUATIONS.values(), ids=EVALUATIONS)
def test_scores(run, options):
    cpu, gpu = (run(device, "eval", RUN, "runtime.dtype=float32", *options.split()) for device in ("cpu", DEVICE))
    assert gpu["bpb"] == pytest.approx(cpu["bpb"], rel=1e-4) and gpu["tokens"] == cpu["tokens"]
    if "adapt" in cpu:
        assert gpu["adapt"]["adapted_bpb"] == pytest.approx(cpu["adapt"]["adapted_bpb"], rel=1e-4)


@pytest.mark.parametrize("options", QUANTISATIONS.values(), ids=QUANTISATIONS)
def test_quantised_runs_are_those_of_the_cpu(run, options):
    scores = []
    for i, device in enumerate(("cpu", DEVICE)):
        run(device, "quantize", RUN, *options.split(), "--no-score", "--out", f"small-{i}")
        scores.append(run("cpu", "eval", f"small-{i}")["bpb"])
    # A code at the middle between two may be rounded to either.
    assert scores[1] == pytest.approx(scores[0], rel=2e-3)
    on_gpu = run(DEVICE, "eval", "small-1", "runtime.dtype=float32")["bpb"]
    assert on_gpu == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize("options", PROBES.values(), ids=PROBES)
def test_probes(run, options):
    assert "NaN" not in json.dumps(run(DEVICE, "eval", RUN, *options.split()))


def test_a_run_that_is_trained_on_a_gpu_goes_on_everywhere(fusedlm, workspace):
    """Trained, reported, exported, imported, packed, and resumed on a CPU."""
    shutil.rmtree("runs")
    assert fusedlm("train", "small.yaml", f"runtime.device={DEVICE}", "train.ema=0.9", "train.eval_every=1").code == 0
    assert fusedlm("report", RUN).code == 0
    assert fusedlm("checkpoint", "consolidate", RUN).code == 0
    scores = [
        json.loads(fusedlm("eval", RUN, "--weights", weights, "--device", device, "--json").out)["bpb"]
        for weights in ("raw", "ema")
        for device in ("cpu", DEVICE)
    ]
    assert all(math.isfinite(bpb) for bpb in scores)
    assert scores[1] == pytest.approx(scores[0], rel=1e-2) and scores[3] == pytest.approx(scores[2], rel=1e-2)
    assert fusedlm("export", RUN, "--to", "hf-code", "exported").code == 0
    assert fusedlm("import", "exported", "imported").code == 0
    assert fusedlm("pack", RUN, "--bytes", 100_000, "--out", "small.flm").code == 0
    for source in (RUN, "imported", "small.flm"):
        outcome = fusedlm("generate", source, "--prompt", "Document", "--max-tokens", 8, "--device", DEVICE)
        assert outcome.code == 0, outcome.err
    resumed = fusedlm("train", "small.yaml", "runtime.device=cpu", "train.ema=0.9", "train.eval_every=1", "--resume")
    assert resumed.code == 0, resumed.err
