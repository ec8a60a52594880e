"""Balance of experts in training: loads are counted once per step, biases move once, and nothing else moves them."""

import contextlib
import shutil

import pytest
import torch

from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch
from fusedlm.distributed import World
from fusedlm.evaluate import score_documents
from fusedlm.generation import generate
from fusedlm.optim import build_optimizer
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.load import load
from fusedlm.testing import part_model, randomise_
from fusedlm.train import train
from fusedlm.train.step import train_step
from tests.generation.conftest import Bytes
from tests.train.runs import assert_same_run, records, resume, short_losses, tiny_recipe

CPU = torch.device("cpu")
MOE = "{type: moe, n_experts: 8, top_k: 2, hidden: 16, bias_rate: 0.1}"
RUN = [f"model.blocks.{name}.ffn={MOE}" for name in "am"]


def moe(ffn: str = MOE, vocab_size: int = 61):
    torch.manual_seed(0)
    return randomise_(part_model("{type: attention, n_heads: 4}", ffn, vocab_size)).train()


def batch(rows: int = 4, n: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(61, (rows, n), generator=generator)
    return Batch(tokens, tokens.roll(-1, 1), None, tokens.numel(), next_sample=rows)


def step(model, full: Batch, optimizer=None, **options):
    optimizer = optimizer or build_optimizer(model, AdamWConfig(lr=0.01), CPU)
    settings = {"lr_scale": 1.0, "micro_batch_size": 4, "grad_clip": 1.0, "autocast": contextlib.nullcontext} | options
    return train_step(model, optimizer, full, **settings)


def biases(model) -> list[torch.Tensor]:
    return [block.ffn.router.bias.clone() for block in model.blocks]


def moved(loads: torch.Tensor, rate: float = 0.1) -> torch.Tensor:
    """A bias that was 0, by definition."""
    direction = torch.sign(loads.double().mean() - loads.double())
    return (rate * (direction - direction.mean())).float()


@pytest.mark.parametrize("micro_batch_size", [4, 1, 3])
def test_a_step_moves_the_biases_once_by_all_loads(micro_batch_size):
    model, full = moe(), batch()
    loads = model(full.tokens).metrics["moe"]
    result = step(model, full, micro_batch_size=micro_batch_size)
    assert torch.equal(result.metrics["moe"], loads) and loads.sum(1).tolist() == [320, 320]
    for bias, counted in zip(biases(model), loads, strict=True):
        torch.testing.assert_close(bias, moved(counted))
        assert bias.abs().max() > 0.05 and abs(bias.sum()) < 1e-6, "the update is centred"


def test_the_update_is_centred_where_loads_are_not():
    """Seven experts below the mean and one above: without the mean removed, biases would drift up together."""
    router = moe().blocks[0].ffn.router
    router.balance(torch.tensor([72, 8, 8, 8, 8, 8, 8, 8]), torch.tensor(True))
    torch.testing.assert_close(router.bias, 0.1 * torch.tensor([-1.75] + [0.25] * 7))
    before = router.bias.clone()
    router.balance(torch.full((8,), 16), torch.tensor(True))  # all even
    assert torch.equal(router.bias, before)


def test_loads_of_large_steps_do_not_overflow():
    router = moe().blocks[0].ffn.router
    router.balance(torch.tensor([2**40, *[0] * 7]), torch.tensor(True))
    assert router.bias[0] < 0 < router.bias[1]


def test_a_skipped_step_moves_nothing():
    model, full = moe(), batch()
    with torch.no_grad():
        model.blocks[1].ffn.experts.up[0, 0, 0] = torch.nan
    assert step(model, full).skipped
    assert not any(bias.any() for bias in biases(model))


def test_recomputation_counts_once():
    plain, recomputed = moe(), moe()
    recomputed.recompute("mixer")
    results = [step(model, batch(), micro_batch_size=2) for model in (plain, recomputed)]
    assert torch.equal(results[0].metrics["moe"], results[1].metrics["moe"])
    assert all(torch.equal(a, b) for a, b in zip(biases(plain), biases(recomputed), strict=True))
    whole = moe()
    for block in whole.blocks:  # of the full layer, as a wrapper might
        forward = block.ffn.forward
        block.ffn.forward = lambda x, context, run=forward: torch.utils.checkpoint.checkpoint(
            run, x, context, use_reentrant=False
        )
    result = step(whole, batch(), micro_batch_size=2)
    assert torch.equal(result.metrics["moe"], results[0].metrics["moe"])
    assert all(torch.equal(a, b) for a, b in zip(biases(plain), biases(whole), strict=True))


def test_evaluation_and_generation_move_nothing():
    model = moe(vocab_size=257)
    documents = [(torch.arange(50).numpy(), 100)]
    for window in (None, 16):
        score = score_documents(model, documents, window=window, device="cpu", dtype=torch.float32)
        assert 0 < score.figures["moe_entropy"] <= 1
    generate(model, Bytes(), ["ab", "c"], max_tokens=5, device="cpu", dtype="float32")
    assert model.training and not any(bias.any() for bias in biases(model))
    evaluated = moe(vocab_size=257)
    score_documents(evaluated, documents, window=16, device="cpu", dtype=torch.float32)
    plain = moe(vocab_size=257)
    results = [step(one, batch()) for one in (evaluated, plain)]
    assert torch.equal(results[0].metrics["moe"], results[1].metrics["moe"]), "no load is left over from evaluation"


class _Half(World):
    """One of two processes, whose other one has the given metrics."""

    def __init__(self, other: dict):
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def sum_all(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor + self.other if tensor.dtype == torch.int64 else tensor for tensor in tensors]


def test_loads_of_all_processes_count():
    model, full = moe(), batch()
    loads = model(full.tokens).metrics["moe"]
    other = loads.flip(1) * 3
    step(model, full, world=_Half(other))
    for bias, own, others in zip(biases(model), loads, other, strict=True):
        torch.testing.assert_close(bias, moved(own + others))
        assert not torch.equal(bias, moved(own))


@pytest.mark.parametrize("key, name", [("sequence_loss", "moe_sequence"), ("z_loss", "moe_z")])
def test_losses_have_the_weight_of_their_micro_batches(key, name):
    full, found = batch(rows=5), []
    for size in (5, 2, 1):
        result = step(moe(MOE.replace("}", f", {key}: 0.5}}")).double(), full, micro_batch_size=size)
        found.append(result.layer_losses[name])
        assert result.loss == pytest.approx(step(moe().double(), full).loss, rel=1e-12)
    assert found == pytest.approx([found[0]] * 3, rel=1e-12) and found[0] > 0.1


def test_the_bias_balances_loads():
    """Tokens of a few kinds: without the bias a few experts get them all."""
    figures = {}
    for rate in (0.0, 0.02):
        model = moe(MOE.replace("0.1", str(rate)))
        optimizer = build_optimizer(model, AdamWConfig(lr=1e-3), CPU)
        results = [step(model, batch(n=64), optimizer) for _ in range(60)]
        figures[rate] = model.summarise(results[-1].metrics)
    assert figures[0.02]["moe_max_load"] < 1.5 < figures[0.0]["moe_max_load"]
    assert figures[0.02]["moe_entropy"] > 0.97 > figures[0.0]["moe_entropy"]


def test_a_run_resumes_bit_for_bit(tmp_path):
    """The biases are in the checkpoint, and no load is between two steps."""
    recipe = tiny_recipe(tmp_path, *RUN)
    train(recipe, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    saved = checkpoints.read_tensors(8, "model")
    names = [name for name in saved if name.endswith("router.bias")]
    assert len(names) == 2 and all(saved[name].any() for name in names)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(Checkpoints(tmp_path / "other/checkpoints").path(12))
    resume(recipe, tmp_path / "other")
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_averaged_weights_come_with_the_biases(tmp_path):
    train(tiny_recipe(tmp_path, *RUN), tmp_path / "run")
    raw, averaged = (load(tmp_path / "run", weights=weights, device="cpu")[0] for weights in ("raw", "ema"))
    own = [block.ffn.router for block in raw.blocks[1:]]
    other = [block.ffn.router for block in averaged.blocks[1:]]
    for one, two in zip(own, other, strict=True):
        assert one.bias.any() and torch.equal(one.bias, two.bias)
        assert not torch.equal(one.project.weight, two.project.weight)


def test_figures_of_a_run(tmp_path):
    train(tiny_recipe(tmp_path, *RUN, "train.steps=4"), tmp_path / "run")
    found = records(tmp_path / "run")
    for prefix, key in (("", "loss"), ("val_", "val_bpb")):
        rows = [row for row in found if key in row]
        assert rows
        for row in rows:
            layers = row[f"{prefix}moe_layers"]
            assert len(layers) == 2
            assert row[f"{prefix}moe_entropy"] == pytest.approx(sum(layer[0] for layer in layers) / 2)
            assert row[f"{prefix}moe_max_load"] == max(layer[1] for layer in layers) >= 1
            assert row[f"{prefix}moe_dead"] == sum(layer[2] for layer in layers)


SWITCHES = [
    "n_experts=6",
    "n_experts=0",
    "top_k=3",
    "hidden=24",
    "n_shared=0",
    "activation=relu2",
    "n_groups=4",
    "n_limited_groups=2",
    "routed_scaling=2.0",
    "bias_rate=0.0",
    "sequence_loss=1.0",
    "z_loss=1.0",
]
GROUPED = [f"model.blocks.{name}.ffn.{key}" for name in "am" for key in ("n_groups=2", "n_limited_groups=1")]


@pytest.fixture(scope="module")
def base_losses(tmp_path_factory):
    return short_losses(tmp_path_factory.mktemp("switches"), *RUN, *GROUPED)


@pytest.mark.parametrize("override", SWITCHES)
def test_every_key_changes_the_losses(base_losses, tmp_path, override):
    own = [f"model.blocks.{name}.ffn.{override}" for name in "am"]
    assert short_losses(tmp_path, *RUN, *GROUPED, *own) != base_losses


def test_the_slope_changes_the_losses(tmp_path):
    found = []
    for index, slope in enumerate((0.0, 0.5)):
        (tmp_path / str(index)).mkdir()
        keys = [f"model.blocks.a.ffn.{key}" for key in ("activation=relu2", f"slope={slope}")]
        found.append(short_losses(tmp_path / str(index), *RUN, *keys))
    assert found[0] != found[1]


def test_the_same_recipe_gives_the_same_losses(base_losses, tmp_path):
    """Without this, the tests above could not fail."""
    assert short_losses(tmp_path, *RUN, *GROUPED) == base_losses
