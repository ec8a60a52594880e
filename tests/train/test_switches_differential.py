"""Every key of the differential mixers, of options on values and of YaRN changes the losses of a run."""

from functools import cache

import pytest

from fusedlm.model import Decoder
from tests.train.runs import short_losses

FAST = "train.optimizer.lr=0.05"  # so that weights that start at zero have an effect within three steps
DIFF = "model.blocks.m.mixer={type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}"
CMD = "model.blocks.m.mixer={type: cmd_mla, n_heads: 2, kv_rank: 8, rope_dim: 4}"
# Enough pairs, of low enough frequency, for both bounds of the ramp to lie inside.
YARN = [
    "model.blocks.m.mixer={type: mla, n_heads: 2, kv_rank: 8, rope_dim: 16, rope_base: 10}",
    "model.yarn={factor: 4, trained_length: 64, beta_fast: 8}",
]
TWO_LAYERS = ["model.n_layers=2", "model.pattern=a"]


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory):
    """Losses of a base, which is trained once."""
    return cache(lambda *base: short_losses(tmp_path_factory.mktemp("base"), FAST, *base))


@pytest.mark.parametrize(
    "base, change",
    [
        ([DIFF], "model.blocks.m.mixer.lambda_init=0.1"),
        ([DIFF], "model.blocks.m.mixer.lambda_form=token"),
        ([DIFF], "model.blocks.m.mixer.kv_rank=4"),
        ([DIFF], "model.blocks.m.mixer.type=mla"),
        ([CMD], "model.blocks.m.mixer.lambda_init=0.1"),
        ([CMD], "model.blocks.m.mixer.noise_dim=4"),
        ([CMD], "model.blocks.m.mixer.type=mla"),
        ([DIFF], "model.blocks.m.mixer.xsa=true"),
        (TWO_LAYERS, "model.blocks.a.mixer.xsa=true"),
        (TWO_LAYERS, "model.blocks.a.mixer.value_residual=true"),
        ([], "model.yarn={factor: 4, trained_length: 4}"),
        (["model.yarn={factor: 4, trained_length: 4}"], "model.yarn.factor=2"),
        (["model.yarn={factor: 4, trained_length: 64}"], "model.yarn.trained_length=16"),
        (YARN, "model.yarn.beta_fast=4"),
        (YARN, "model.yarn.beta_slow=4"),
    ],
)
def test_changes_the_losses(losses_of, tmp_path, base, change):
    assert short_losses(tmp_path, FAST, *base, change) != losses_of(*base)


@pytest.mark.parametrize("wanted", ["none", "mixer", "block"])
def test_recompute_follows_the_recipe_and_changes_no_loss(tmp_path, monkeypatch, wanted):
    called, recompute = [], Decoder.recompute
    monkeypatch.setattr(Decoder, "recompute", lambda self, what: (called.append(what), recompute(self, what)))
    (tmp_path / "plain").mkdir()
    plain = short_losses(tmp_path / "plain")
    assert short_losses(tmp_path, f"runtime.recompute={wanted}") == plain
    assert called == ["none", wanted]
