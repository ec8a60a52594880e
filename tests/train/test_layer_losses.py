"""Losses and metrics of layers (routed feed-forwards) in training steps, scores and metrics.jsonl."""

import contextlib

import pytest
import torch

from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch
from fusedlm.evaluate import score_documents
from fusedlm.optim import build_optimizer
from fusedlm.testing import FFN_CASES, assert_close, part_model, randomise_
from fusedlm.train import train
from fusedlm.train.step import backward, train_step
from tests.train.runs import records, tiny_recipe

CPU = torch.device("cpu")


def routed(budget: float = 0.6, weight: float = 1.0):
    torch.manual_seed(0)
    ffn = f"{{type: routed, hidden: 64, budget: {budget}, budget_weight: {weight}}}"
    return part_model("{type: attention, n_heads: 4}", ffn)


def batch(rows: int = 4, n: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(61, (rows, n), generator=generator)
    return Batch(tokens, tokens.roll(-1, 1), None, tokens.numel(), next_sample=rows)


def run_steps(model, steps: int, n: int = 40, **options) -> list:
    optimizer = build_optimizer(model, AdamWConfig(lr=0.01), CPU)
    settings = {"lr_scale": 1.0, "micro_batch_size": 2, "grad_clip": 1.0, "autocast": contextlib.nullcontext} | options
    return [train_step(model.train(), optimizer, batch(n=n), **settings) for _ in range(steps)]


def test_training_reaches_the_budget():
    fractions = {}
    for budget in (0.4, 0.65):
        model = routed(budget, weight=10.0)
        steps = run_steps(model, 50, n=128, micro_batch_size=4)
        first, *_, last = (model.summarise(result.metrics) for result in steps)
        fractions[budget] = last["routed_flops_share"]
        assert abs(last["routed_flops_share"] - budget) < 0.1
        assert abs(first["routed_flops_share"] - last["routed_flops_share"]) > 0.1
        assert first["routed_budget"] == pytest.approx(budget, abs=1e-3)
    model = routed(0.4, weight=0.0)
    free = model.summarise(run_steps(model, 50, n=128, micro_batch_size=4)[-1].metrics)["routed_flops_share"]
    assert all(abs(free - fraction) > 0.1 for fraction in fractions.values())


def test_the_reported_loss_is_that_of_the_targets_alone():
    plain, weighted = (run_steps(routed(0.3, weight), 2) for weight in (0.0, 1000.0))
    assert plain[0].loss == weighted[0].loss and plain[0].grad_norm < weighted[0].grad_norm
    assert plain[1].loss != weighted[1].loss
    assert plain[0].layer_losses == {"routed_budget": 0.0} and weighted[0].layer_losses["routed_budget"] > 1


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_losses_of_micro_batches_are_weighted_by_their_rows(micro_batch_size):
    model, full = randomise_(routed()).double(), batch(rows=5)
    losses, _ = backward(model, full, micro_batch_size, contextlib.nullcontext)
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    nll = model(full.tokens, targets=full.targets).losses["nll"]
    budget = torch.zeros(())
    for start in range(0, 5, micro_batch_size):
        rows = full.tokens[start : start + micro_batch_size]
        found = model(rows, targets=rows).losses["routed_budget"]
        budget = budget + found * len(rows) / 5
    (nll + budget).backward()
    assert losses["nll"].item() == pytest.approx(nll.item(), rel=1e-12)
    assert losses["routed_budget"].item() == pytest.approx(budget.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        assert_close(actual[name], parameter.grad, 1e-10, name)


def test_models_without_such_layers_report_nothing():
    for ffn in (FFN_CASES["swiglu"][0], FFN_CASES["relu2"][0]):
        model = part_model("{type: attention, n_heads: 4}", ffn)
        (result,) = run_steps(model, 1)
        assert result.layer_losses == {} and result.metrics == {} and model.summarise(result.metrics) == {}


def test_metrics_cover_every_layer_and_micro_batch():
    model = routed()
    results = [model.summarise(run_steps(routed(), 1, micro_batch_size=size)[0].metrics) for size in (4, 1)]
    counts = model(batch().tokens).metrics["routed"]
    expected = [[count / 160 for count in row[:3]] for row in counts.tolist()]
    assert results[0]["routed_layers"] == results[1]["routed_layers"] == expected
    light, blend, full = (results[0][f"routed_{level}"] for level in ("light", "blend", "full"))
    assert [light, blend, full] == pytest.approx([(a + b) / 2 for a, b in zip(*expected, strict=True)])
    exact = 8 / (3 * 64) + 0.25 * light + blend + full
    assert exact <= results[0]["routed_flops_share"] < exact + 0.75 * 16 / 160  # incomplete tiles are filled up
    assert results[1]["routed_flops_share"] > results[0]["routed_flops_share"]


def test_scores_count_the_scored_tokens():
    model = routed().eval()
    documents = [(torch.randint(61, (n,)).numpy(), 2 * n) for n in (30, 7, 52)]
    full = score_documents(model, documents, window=None, device="cpu", dtype=torch.float32)
    windows = score_documents(model, documents, window=64, stride=64, device="cpu", dtype=torch.float32)
    counts = sum(model(torch.from_numpy(tokens)[None, :-1]).metrics["routed"][:, :3] for tokens, _ in documents)
    expected = (counts / 86).tolist()  # without the padding of the windows' batches
    for score in (full, windows):
        assert score.tokens == 86
        for fractions, wanted in zip(score.figures["routed_layers"], expected, strict=True):
            assert fractions == pytest.approx(wanted)
    plain = part_model("{type: attention, n_heads: 4}")
    assert score_documents(plain, documents, window=None, device="cpu", dtype=torch.float32).figures == {}


def test_scores_do_not_depend_on_the_budget():
    documents = [(torch.arange(50).numpy(), 100)]
    nll = []
    for budget, weight in ((0.3, 100.0), (0.9, 0.0)):
        model = routed(budget, weight)
        nll.append(score_documents(model, documents, window=None, device="cpu", dtype=torch.float32).nll)
    assert nll[0] == nll[1]


def test_compiled_blocks_train_alike_and_share_one_graph():
    """Whatever number of tokens is on each level, also 0."""
    torch._dynamo.reset()
    eager, compiled = routed(0.3, 5.0), routed(0.3, 5.0)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in compiled.blocks:
        block.compile(fullgraph=True, backend=count)
    for low, high in ((0.3, 0.7), (1.5, 2.0), (-2.0, -1.0)):
        for block in (*eager.blocks, *compiled.blocks):
            block.ffn.low, block.ffn.high = low, high
        for expected, actual in zip(run_steps(eager, 4), run_steps(compiled, 4), strict=True):
            assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
            assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert actual.layer_losses == pytest.approx(expected.layer_losses, rel=1e-4)
            assert torch.equal(actual.metrics["routed"], expected.metrics["routed"])
        if low == 0.3:
            assert len(graphs) == 1


def test_metrics_of_a_run(tmp_path):
    ffn = "{type: routed, hidden: 32, light: 0.5, budget: 0.7}"
    recipe = tiny_recipe(tmp_path, f"model.blocks.a.ffn={ffn}", f"model.blocks.m.ffn={ffn}", "train.steps=4")
    train(recipe, tmp_path / "run")
    found = records(tmp_path / "run")
    steps, validations = ([r for r in found if key in r] for key in ("loss", "val_bpb"))
    for prefix, rows in (("", steps), ("val_", validations)):
        assert rows
        for row in rows:
            layers = row[f"{prefix}routed_layers"]
            assert len(layers) == 2 and all(sum(fractions) == pytest.approx(1) for fractions in layers)
            for i, name in enumerate(("light", "blend", "full")):
                assert row[f"{prefix}routed_{name}"] == pytest.approx((layers[0][i] + layers[1][i]) / 2)
            assert 0.5 < row[f"{prefix}routed_flops_share"] < 2
            assert row[f"{prefix}routed_budget"] == pytest.approx(0.7, abs=1e-3)
    assert all(row["loss_routed_budget"] > 0 for row in steps)
    assert not any("loss_routed_budget" in row for row in validations)
