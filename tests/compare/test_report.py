"""Results are those of the runs, and the page states the setup."""

import csv
import json
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusedlm.compare import run_experiment
from fusedlm.compare.report import write_report
from fusedlm.compare.results import ROW
from fusedlm.config.experiment import load_experiment
from fusedlm.data import prepare
from fusedlm.evaluate import score_documents
from fusedlm.model import build_model
from fusedlm.model.accounting import state_bytes
from fusedlm.report.units import count, size
from fusedlm.runs.load import load
from fusedlm.runs.metrics import read_metrics
from tests.report.test_report import colours, curves, drawings, parse

PLOTS = {"final", "validation", "seconds", "difference", "training", "flops", "cost", "state", "decoding"}


@pytest.fixture(scope="module")
def tree(finished):
    return json.loads((finished[1] / "results.json").read_text())


def test_rows_have_the_metrics_of_the_runs(finished, tree):
    _, out, _ = finished
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == ROW and len(table) == len(tree["runs"]) == 4
    for line, row in zip(table, tree["runs"], strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}
        found, _ = read_metrics(out / "runs" / f"{row['variant']}-seed{row['seed']}" / "metrics.jsonl")
        steps = [record for record in found if "loss" in record]
        validations = [record for record in found if "val_bpb" in record]
        assert (row["steps"], row["tokens"]) == (4, steps[-1]["tokens"]) == (4, 4 * 4 * 16)
        assert row["train_loss"] == steps[-1]["loss"]
        assert row["train_loss_last_10"] == pytest.approx(statistics.mean(record["loss"] for record in steps))
        assert row["tokens_per_second"] == statistics.median(record["tokens_per_second"] for record in steps)
        assert row["peak_memory_bytes"] == max(record["peak_memory_bytes"] for record in steps)
        assert row["training_seconds"] == pytest.approx(sum(record["step_seconds"] for record in steps))
        assert row["best_val_bpb"] == min(record["val_bpb"] for record in validations)


def test_the_final_loss_is_on_all_validation_text(finished, tree):
    """During training the recipe validates on 100 tokens."""
    row = tree["runs"][0]
    run = finished[1] / "runs/latent-seed0"
    model, _, recipe = load(run, device="cpu")
    shards = prepare(recipe.data).validation
    score = score_documents(model, shards.documents(), window=16, stride=16, device="cpu", dtype=torch.float32)
    assert score.tokens == shards.n_tokens - shards.n_documents > 150
    assert row["val_loss"] == pytest.approx(score.nll_per_token, rel=1e-9)
    assert row["val_bpb"] == pytest.approx(score.bpb, rel=1e-9)
    last = [record for record in read_metrics(run / "metrics.jsonl")[0] if "val_bpb" in record][-1]
    assert last["val_tokens"] < score.tokens and last["val_bpb"] != row["val_bpb"]


def test_summaries_and_verdict_are_those_of_the_losses(tree):
    losses = {name: [row["val_loss"] for row in tree["runs"] if row["variant"] == name] for name in tree["variants"]}
    for name, values in losses.items():
        summary = tree["variants"][name]["val_loss"]
        assert summary["mean"] == pytest.approx(statistics.mean(values))
        assert summary["std"] == pytest.approx(statistics.stdev(values))
        assert summary["high"] - summary["mean"] == pytest.approx(12.706205 * statistics.stdev(values) / 2**0.5)
    difference = np.subtract(losses["softmax"], losses["latent"])
    against = tree["variants"]["softmax"]["against_baseline"]["val_loss"]
    assert against["difference"]["mean"] == pytest.approx(difference.mean())
    assert "against_baseline" not in tree["variants"]["latent"] and tree["baseline"] == "latent"
    assert tree["verdicts"] == [against["sentence"]]
    assert tree["metric"]["unit"] == "nats per token"


def test_sizes_and_states_are_those_of_live_models(finished, tree):
    for name, found in tree["variants"].items():
        recipe = finished[0].results.variants[name].recipe
        model = build_model(recipe.model, vocab_size=257)
        assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert found["training_flops"] == found["flops_per_token"] * 256
        assert set(found["decoding"]) == {"20", "70"}
        for length, measured in found["decoding"].items():
            assert measured["state_bytes"] == state_bytes(model, int(length), torch.float32)
            assert measured["tokens_per_second"] > 0
        assert found["recipe"] == recipe.model_dump(mode="json")


def test_the_page_shows_verdict_setup_and_plots(finished):
    outcome, out, _ = finished
    page = parse(out / "report.html")
    assert {path.stem for path in (out / "plots").iterdir()} == PLOTS
    drawn = {kind: len(found) for kind, found in page.svgs().items()}
    assert drawn == {"full": len(PLOTS) - 2, "narrow": len(PLOTS) - 2, "half": 2}
    assert all(source.startswith("#") for source in page.sources) and (out / "report.html").stat().st_size < 1_500_000
    assert page.text.index(outcome.results.verdicts()[0]) < page.text.index("Tokens per run"), "the verdict is first"
    assert "b" not in page.tags and "<b>Two</b> mixers & two seeds." in page.text
    environment = json.loads((out / "runs/latent-seed0/environment.json").read_text())
    change = str(outcome.results.variants["softmax"].changes[0])
    for words in (
        outcome.results.verdicts()[0],
        "model.pattern=m",
        change,
        environment["device_name"],
        environment["torch"],
        environment["date"][:10],
        "0, 1",
        "4 sequences of 16 tokens",
        "training FLOPs per token",  # parameters are matched, and what is not equal is listed
        "16 tokens, stride 16",  # of validations
    ):
        assert words in page.text, words
    assert re.search(r"compiled\s+no", page.text)
    assert "blocks.0" not in page.text, "the names of parameters are no environment"
    assert [found["runs"] for found in outcome.results.environments] == [4], "the same for both variants"


def test_every_variant_has_its_colour_and_its_values_under_the_pointer(finished, tree):
    page = parse(finished[1] / "report.html")
    found = colours(page)
    both = [{"latent": "c0", "softmax": "c1"}]
    assert found.pop("Validation loss relative to latent") == [{"softmax": "c1"}]
    lines = {"Validation loss", "Validation loss against training time", "Training loss", "Loss against training FLOPs"}
    lengths = {"Decoding state against length": size, "Decoding throughput against length": count}
    assert found == dict.fromkeys(lines | lengths.keys(), both)
    drawn = drawings((finished[1] / "report.html").read_text())
    for title in ("Final validation loss", "Training throughput and memory", *found):
        for svg in drawn[title]:
            assert all(f"var(--{colour})" in svg for colour in ("c0", "c1")), title
            assert all(f">{name}</text>" in svg for name in both[0]), title
    for (title, written), key in zip(lengths.items(), ("state_bytes", "tokens_per_second"), strict=True):
        for name, (_, x, _, texts) in curves(page)[title][0].items():
            measured = tree["variants"][name]["decoding"]
            assert x == [20, 70] and texts == [written(measured[length][key]) for length in ("20", "70")]
    _, tokens, losses, texts = curves(page)["Validation loss"][0]["softmax"]
    at = {128: [], 256: []}
    for seed in (0, 1):
        for record in read_metrics(finished[1] / f"runs/softmax-seed{seed}/metrics.jsonl")[0]:
            if "val_bpb" in record:
                at[record["tokens"]].append(record["val_nll_per_token"])
    assert tokens == list(at) and losses == pytest.approx([statistics.mean(both) for both in at.values()], rel=1e-4)
    assert texts is None


def test_the_same_results_give_the_same_page(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("fusedlm.report.style.DPI", 30)
    written = write_report(finished[0].results, tmp_path)
    assert written.read_bytes() == (finished[1] / "report.html").read_bytes()


def test_variants_with_different_tokenizers_are_compared_by_bits_per_byte(finished):
    results = finished[0].results
    recipe = results.variants["softmax"].recipe
    data = type(recipe.data).model_validate(recipe.data.model_dump() | {"tokenizer": {"type": "bpe"}})
    changed = replace(results.variants["softmax"], recipe=recipe.model_copy(update={"data": data}))
    other = replace(results, variants=results.variants | {"softmax": changed})
    assert "bits per byte" in other.verdicts()[0] and "nats" not in other.verdicts()[0]


def test_one_validation_is_no_curve(experiment_file, in_process, with_plots, tmp_path):
    overrides = ["train.eval_every=0", "experiment.decode_lengths=[]"]
    run_experiment(*load_experiment(experiment_file, overrides), tmp_path / "out")
    plots = {path.stem for path in (tmp_path / "out/plots").iterdir()}
    assert {"final", "training", "flops"} < plots and not plots & {"validation", "seconds", "difference"}
