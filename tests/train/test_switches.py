"""Every key of a recipe has an effect: changing it changes the losses of a run, or what is called."""

import pytest
import torch

from fusedlm.train import train, trainer
from tests.train.runs import SHORT, short_losses, tiny_recipe


@pytest.fixture(scope="module")
def base_losses(tmp_path_factory):
    return short_losses(tmp_path_factory.mktemp("switches"))


@pytest.mark.parametrize(
    "override",
    [
        "model.dropout=0",
        "model.tie_embeddings=false",
        "model.logit_softcap=1.0",
        "model.embedding_std=0.1",
        "model.embedding_rms=null",
        "model.norm_eps=0.1",
        "model.blocks.a.mixer.qk_norm=false",
        "model.blocks.a.mixer.rope_dim=2",
        "model.blocks.a.mixer.rope_base=10",
        "model.blocks.a.mixer.n_kv_heads=1",
        "model.blocks.a.mixer.window=2",
        "model.blocks.m.mixer.q_rank=4",
        "model.blocks.m.mixer.n_kv_groups=1",
        "model.blocks.m.mixer.rope_dim=0",
        "model.blocks.g.mixer.conv_size=1",
        "model.blocks.g.mixer.value_head_dim=4",
        "model.blocks.g.ffn.slope=0.5",
        "data.document_mask=false",
        "data.tokenizer={type: bpe, vocab_size: 280}",
        "data.split.fraction=0.5",
        "train.seed=1",
        "train.grad_clip=0.01",
        "train.optimizer.lr=0.02",
        "train.optimizer.beta1=0.5",
        "train.optimizer.beta2=0.5",
        "train.optimizer.eps=0.1",
        "train.optimizer.weight_decay=5.0",
        "train.optimizer={type: adamw, lr: 0.01, cautious: true}",
        "train.optimizer={type: sgd, lr: 0.01}",
        "train.optimizer={type: sgd, lr: 0.01, momentum: 0.5}",
        "train.schedule={type: cosine, warmup: 0.9}",
        "runtime.dtype=bfloat16",
    ],
)
def test_changes_the_losses(base_losses, tmp_path, override):
    assert short_losses(tmp_path, override) != base_losses


MUON = "train.optimizer={type: normuon_adamw}"
FEW_LAYERS = ["model.n_layers=1", "model.pattern=a", "model.dropout=0"]


@pytest.fixture(scope="module")
def muon_losses(tmp_path_factory):
    return short_losses(tmp_path_factory.mktemp("muon"), *FEW_LAYERS, MUON)


@pytest.mark.parametrize(
    "override",
    [
        "{type: muon_adamw}",
        "{type: normuon_adamw, matrix: {lr: 0.05}}",
        "{type: normuon_adamw, matrix: {momentum: 0.5}}",
        "{type: normuon_adamw, matrix: {nesterov: false}}",
        "{type: normuon_adamw, matrix: {weight_decay: 3.0}}",
        "{type: normuon_adamw, matrix: {cautious: true}}",
        "{type: normuon_adamw, matrix: {scheme: turbo}}",
        "{type: normuon_adamw, matrix: {scaling: rms}}",
        "{type: normuon_adamw, matrix: {beta2: 0.5}}",
        "{type: normuon_adamw, rest: {lr: 0.01}}",
        "{type: normuon_adamw, rest: {beta1: 0.5}}",
        "{type: normuon_adamw, rest: {beta2: 0.5}}",
        "{type: normuon_adamw, rest: {eps: 0.1}}",
    ],
)
def test_changes_the_losses_of_normuon(muon_losses, tmp_path, override):
    assert short_losses(tmp_path, *FEW_LAYERS, f"train.optimizer={override}") != muon_losses


def test_the_same_recipe_gives_the_same_losses(base_losses, tmp_path):
    """Without this, the test above could not fail."""
    assert short_losses(tmp_path) == base_losses


@pytest.mark.parametrize("wanted", [True, False])
def test_compile_compiles_all_blocks_and_the_head(tmp_path, monkeypatch, wanted):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    train(tiny_recipe(tmp_path, *SHORT, f"runtime.compile={str(wanted).lower()}"), tmp_path / "run")
    names = sorted(type(module).__name__ for module, _ in compiled)
    assert names == (["Block", "Block", "Block", "LMHead"] if wanted else [])
    assert all(options == {"fullgraph": True, "backend": "inductor", "dynamic": None} for _, options in compiled)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_is_on_during_the_run_and_restored_after_it(tmp_path, monkeypatch, wanted):
    seen, train_step = [], trainer.train_step

    def spy(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train_step(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", spy)
    train(tiny_recipe(tmp_path, *SHORT, f"runtime.deterministic={str(wanted).lower()}"), tmp_path / "run")
    assert seen == [wanted] * 3 and not torch.are_deterministic_algorithms_enabled()
