"""fusedlm plan: figures that add up, what fits where, time and cost, and a table for narrow terminals."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from fusedlm.cli.gpus import GPUS, USABLE
from fusedlm.cli.plan import fit
from fusedlm.cli.plan_table import flops, plan_lines


def _json(outcome) -> dict:
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_the_figures_add_up(workspace: Path, fusedlm):
    estimate = _json(fusedlm("plan", "small.yaml", "train.ema=0.9", "--json", "--mfu", 0.5, "--device-flops", 1e12))
    assert estimate["tokens"] == 2 * 2 * 16
    assert estimate["seconds"] == pytest.approx(estimate["training_flops_per_token"] * 64 / 0.5e12)
    assert estimate["average_bytes"] == estimate["weight_bytes"] == 4 * estimate["parameters"]
    assert estimate["weight_copy_bytes"] == 2 * estimate["parameters"]
    parts = ("weight", "gradient", "optimizer", "average", "weight_copy", "activation")
    assert estimate["memory_bytes"] == sum(estimate[f"{part}_bytes"] for part in parts)
    assert estimate["cost"] is None and estimate["vocab_source"] == "tokenizer"


def test_time_and_cost_are_those_of_the_gpu(workspace: Path, fusedlm):
    found = {gpu: _json(fusedlm("plan", "demo", "--json", "--gpu", gpu, "--price", 2)) for gpu in ("h100", "L4")}
    assert found["h100"]["seconds"] * 989 == pytest.approx(found["L4"]["seconds"] * 121)
    assert found["L4"]["gpu"] == "l4" and found["L4"]["mfu"] == 0.45
    assert found["L4"]["cost"] == pytest.approx(2 * found["L4"]["seconds"] / 3600)
    assert _json(fusedlm("plan", "demo", "--json"))["seconds"] == found["h100"]["seconds"]


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [
        ("{type: adamw, lr: 0.01}", 8),
        ("{type: sgd, lr: 0.01, momentum: 0.9}", 4),
        ("{type: sgd, lr: 0.01, momentum: 0.0}", 0),
    ],
    ids=["adamw", "sgd with momentum", "sgd"],
)
def test_the_state_of_the_recipes_optimizer_counts(workspace: Path, fusedlm, optimizer, bytes_per_parameter):
    override = f"train.optimizer={optimizer}"
    estimate = _json(fusedlm("plan", "small.yaml", override, "--json"))
    assert estimate["optimizer_bytes"] == bytes_per_parameter * estimate["parameters"]
    trained = fusedlm("train", "small.yaml", override, "train.steps=1", "--out", "runs/other")
    assert trained.code == 0, trained.err
    state = safetensors.torch.load_file("runs/other/checkpoints/step-00000001/optimizer.safetensors")
    assert sum(tensor.nbytes for tensor in state.values() if tensor.dim()) == estimate["optimizer_bytes"]
    shown = re.search(r"^ +optimizer +(\d\S*) KiB", fusedlm("plan", "small.yaml", override).out, re.MULTILINE)
    assert bool(shown) == bool(bytes_per_parameter)
    if shown:
        assert float(shown[1]) * 1024 == pytest.approx(estimate["optimizer_bytes"], rel=5e-3)


def test_the_vocabulary_is_that_of_the_tokenizer_file(workspace: Path, fusedlm):
    trained = fusedlm("train", "small.yaml", "data.tokenizer={type: bpe, vocab_size: 270}", "--out", "runs/bpe")
    assert trained.code == 0, trained.err
    recipe = yaml.safe_load(Path("runs/bpe/recipe.yaml").read_text())
    assert recipe["data"]["tokenizer"]["vocab_size"] == 270
    file = "data.tokenizer={type: file, path: runs/bpe/tokenizer.json}"
    assert _json(fusedlm("plan", "small.yaml", file, "--json"))["vocab_size"] == 270
    stated = "data.tokenizer={type: file, path: runs/bpe/tokenizer.json, vocab_size: 999}"
    outcome = fusedlm("plan", "small.yaml", stated)
    assert (outcome.code, "data.tokenizer.vocab_size=999" in outcome.err) == (2, True)


def test_without_the_tokenizer_file_the_stated_size_is_used_and_named(workspace: Path, fusedlm):
    outcome = fusedlm("plan", "gpt-350m")
    assert outcome.code == 0, outcome.err
    assert "50,257" in outcome.out and "The tokenizer file does not exist" in outcome.out
    missing = "data.tokenizer={type: file, path: none.json}"
    estimate = _json(fusedlm("plan", "small.yaml", missing, "--vocab-size", 1000, "--json"))
    assert (estimate["vocab_size"], estimate["vocab_source"]) == (1000, "option")
    assert "--vocab-size" in fusedlm("plan", "small.yaml", missing).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; one of b200"),
        (["--price", "-1"], "--price -1.0"),
        (["--price", "nan"], "--price nan"),
        (["--mfu", "0"], "--mfu 0.0"),
        (["--device-flops", "inf"], "--device-flops inf"),
        (["--vocab-size", "0"], "vocab_size=0"),
    ],
)
def test_bad_options_are_one_line(workspace: Path, fusedlm, options, words):
    outcome = fusedlm("plan", "small.yaml", *options)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert words in outcome.err


HUGE = ["model.dim=16384", "model.n_layers=100", "model.blocks.a.mixer.n_heads=128", "train.steps=1000000"]


@pytest.mark.parametrize("overrides", [[], HUGE], ids=["recipe", "huge"])
def test_forty_columns_are_enough(workspace: Path, fusedlm, overrides):
    options = ["--gpu", "h100-pcie", "--price", 12.5]
    estimate = _json(fusedlm("plan", "gpt-350m", *overrides, *options, "--json"))
    narrow, wide = plan_lines(estimate, 40), plan_lines(estimate, 100)
    assert max(map(len, narrow)) <= 40 and max(map(len, wide)) <= 100
    # Each figure of the wide table is whole in the narrow one, in the same line.
    rows = [line for line in wide if line.startswith("  ")]
    assert len(rows) > 15
    for row in rows:
        assert any(row.startswith(line) for line in narrow if line.startswith("  ")), row
    text = " ".join(" ".join(narrow).split())
    assert all(re.search(rf"[ :]{re.escape(name)}[,.;]", text) for name in GPUS)


def test_what_is_read_of_each_source_is_planned(workspace: Path, fusedlm):
    names = ("web", "a-name-that-is-rather-long")
    sources = [f"{name}: {{source: {{type: text, path: {name}.txt}}}}" for name in names]
    stages = "[{until: 0.5, weights: {web: 3, a-name-that-is-rather-long: 1}}, {weights: {web: 1}}]"
    given = ["data.source=null", f"data.sources={{{', '.join(sources)}}}", f"data.stages={stages}", "train.steps=1000"]
    estimate = _json(fusedlm("plan", "small.yaml", *given, "data.packing=best_fit", "--json"))
    assert [(one["name"], one["path"], one["tokens"]) for one in estimate["text"]] == [
        ("a-name-that-is-rather-long", "a-name-that-is-rather-long.txt", 16 * 250),
        ("web", "web.txt", 16 * 1750),
    ]
    assert sum(one["tokens"] for one in estimate["text"]) == estimate["tokens"] and estimate["packing"] == "best_fit"
    narrow, wide = ("\n".join(plan_lines(estimate, columns)) for columns in (40, 100))
    assert max(map(len, narrow.splitlines())) <= 40
    assert re.search(r"web +28.0 k  87.5% of the tokens, web.txt", wide) and "best_fit" in narrow
    assert "Stages: a-name-that-is-rather-long 25%, web 75%, to 16,000 tokens; then web 100%." in wide
    [only] = _json(fusedlm("plan", "small.yaml", "--json"))["text"]
    assert only == {"name": None, "type": "text", "path": "text.txt", "tokens": 64}


def test_fits():
    def activations(micro_batch):
        return 10 * micro_batch

    assert fit(100, 20, activations, 8) == {"gpus": 1, "micro_batch_size": 8}
    assert fit(99, 20, activations, 8) == {"gpus": 1, "micro_batch_size": 4}
    assert fit(99, 20, activations, 7) == {"gpus": 1, "micro_batch_size": 7}
    assert fit(30, 100, activations, 8) == {"gpus": 5, "micro_batch_size": 1}
    assert fit(10, 1, activations, 8) == {"gpus": None, "micro_batch_size": 1}


def test_what_fits_where(workspace: Path, fusedlm):
    estimate = _json(fusedlm("plan", "gpt-350m", "--json"))
    assert estimate["memory_bytes"] < USABLE * GPUS["h100"].memory_bytes
    assert estimate["fits"]["h100"] == {"gpus": 1, "micro_batch_size": 16}
    assert estimate["fits"]["l4"] == {"gpus": 1, "micro_batch_size": 8}
    with_recompute = _json(fusedlm("plan", "gpt-350m", "runtime.recompute=mixer", "--json"))
    assert with_recompute["activation_bytes"] == estimate["activation_bytes_by_recompute"]["mixer"]
    assert with_recompute["fits"]["l4"] == {"gpus": 1, "micro_batch_size": 16}


@pytest.mark.parametrize(
    ("value", "text"),
    [(12, "12"), (2.777e9, "2.78 G"), (2.91e17, "291 P"), (9.996e14, "1 P"), (1.04e24, "1.04 Y"), (5e28, "50,000 Y")],
)
def test_flops(value, text):
    assert flops(value) == text


def test_a_sharded_run_is_planned_per_gpu(workspace: Path, fusedlm):
    one = _json(fusedlm("plan", "small.yaml", "--json"))
    four = _json(fusedlm("plan", "small.yaml", "runtime.parallel.shard=4", "--json"))
    copies = _json(fusedlm("plan", "small.yaml", "runtime.parallel={replicate: 2, shard: 1}", "--json"))
    for part in ("weight", "gradient", "optimizer"):
        assert 0.25 <= four[f"{part}_bytes"] / one[f"{part}_bytes"] < 0.35  # gains are held in full
        assert copies[f"{part}_bytes"] == one[f"{part}_bytes"]
    assert (four["processes"], four["shards"], copies["processes"], copies["shards"]) == (4, 4, 2, 1)
    assert [found["gpus"] for found in four["fits"].values()] == [found["gpus"] for found in one["fits"].values()]
    assert copies["micro_batch_size"] == 1 and copies["activation_bytes"] < one["activation_bytes"]
    shown = fusedlm("plan", "small.yaml", "runtime.parallel.shard=4").out
    assert "per GPU, 4 GPUs, 4 shards" in shown


def test_of_zero_2_all_blocks_are_gathered(workspace: Path, fusedlm):
    """Of ZeRO 3 two."""

    def planned(n_layers: int, zero: int) -> dict:
        options = [f"model.n_layers={n_layers}", f"runtime.parallel={{shard: 4, zero: {zero}}}", "--json"]
        return _json(fusedlm("plan", "small.yaml", *options))

    (two, held), (two_gathered, gathered) = ([planned(n_layers, zero) for n_layers in (2, 6)] for zero in (2, 3))
    of_four_blocks = 2 * (held["parameters"] - two["parameters"])  # bfloat16
    assert held["weight_copy_bytes"] == two["weight_copy_bytes"] + of_four_blocks
    assert gathered["weight_copy_bytes"] == two_gathered["weight_copy_bytes"]
    more = held["weight_copy_bytes"] - gathered["weight_copy_bytes"]
    assert held["memory_bytes"] == gathered["memory_bytes"] + more > gathered["memory_bytes"]


def test_divided_experts_are_planned_per_gpu(workspace: Path, fusedlm):
    """Of a model that is mostly experts, which the processes of `experts` hold in parts as those of `shard` do."""
    mixture = ["model.pattern=m", "model.blocks.m.ffn={type: moe, n_experts: 8, top_k: 2, hidden: 64}"]

    def planned(layout: str) -> dict:
        options = [f"runtime.parallel={layout}", "train.batch_size=4", "--json"]
        return _json(fusedlm("plan", "small.yaml", *mixture, *options))

    sharded, divided = planned("{shard: 4}"), planned("{experts: 4}")
    both, copies = planned("{shard: 2, experts: 2}"), planned("{replicate: 2, experts: 2}")
    for part in ("weight", "gradient", "optimizer"):
        assert sharded[f"{part}_bytes"] == divided[f"{part}_bytes"] == both[f"{part}_bytes"] < copies[f"{part}_bytes"]
    assert [found["processes"] for found in (sharded, divided, both, copies)] == [4] * 4
    assert [found["shards"] for found in (divided, both, copies)] == [4, 4, 2]
    # What is received is saved: a row per token and expert, in bfloat16, in each layer.
    model = yaml.safe_load(Path("small.yaml").read_text())["model"]
    rows = 2 * model["n_layers"] * divided["micro_batch_size"] * divided["seq_len"]
    assert divided["activation_bytes"] - sharded["activation_bytes"] == 2 * rows * model["dim"]
    # One gathers all experts of two layers, the other has its own of each.
    assert divided["weight_copy_bytes"] < sharded["weight_copy_bytes"]
    assert divided["fits"] == sharded["fits"]
    outcome = fusedlm("plan", "small.yaml", *mixture, "runtime.parallel.experts=3")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and "does not divide" in outcome.err
