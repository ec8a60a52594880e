"""The coordinate check in miniature: activations grow with the width, and with muP they do not."""

import pytest
import torch

from fusedlm.config.train import AdamWConfig, NorMuonAdamWConfig, SGDConfig
from fusedlm.probes import probe_coordinates
from fusedlm.probes.coordinates import measure
from fusedlm.probes.plots import coordinates_plot
from fusedlm.testing import part_config, part_model

ATTENTION = "{type: attention, n_heads: 2}"
WHERE = {"device": torch.device("cpu"), "dtype": torch.float32}
SIZES = {"vocab_size": 61, "batch_size": 4, "seq_len": 16}


@pytest.mark.parametrize("tied", [True, False])
def test_activations_grow_with_the_width_and_with_mup_they_do_not(tied):
    config = part_config(ATTENTION, "{type: swiglu}", f"tie_embeddings: {str(tied).lower()}")
    optimizer = AdamWConfig(lr=2e-3)
    result = probe_coordinates(config, optimizer, widths=(32, 128), rate=5.0, steps=8, **SIZES, **WHERE)
    kinds = {"embedding", "a", "logits", *(f"a.{n}" for n in ("mixer", "mixer.qkv", "mixer.out"))}
    kinds |= {f"a.{name}" for name in ("ffn", "ffn.gate_up", "ffn.down")}
    assert set(result["growth"]["mup"]) == kinds
    assert all(0.5 < growth < 2 for growth in result["growth"]["mup"].values()), result["growth"]["mup"]
    grown = result["growth"]["standard"]
    assert grown["a.mixer"] > 2 and grown["a.ffn"] > 2 and grown["logits"] > 1.4, grown
    at_base = [[series[0] for series in result["values"][name].values()] for name in ("standard", "mup")]
    assert at_base[0] == at_base[1]
    assert coordinates_plot(result).startswith(b"\x89PNG")


def test_means_are_those_of_the_outputs():
    model = part_model(ATTENTION).eval()
    tokens = torch.arange(10).view(2, 5)
    found = measure(model, tokens, torch.no_grad)
    with torch.no_grad():
        logits, embedding = model(tokens).logits, model.embedding(tokens) * model.embedding_scale
    assert found["logits"] == pytest.approx(logits.abs().mean().item(), rel=1e-5)
    assert found["embedding"] == pytest.approx(embedding.abs().mean().item(), rel=1e-5)
    assert found["a"] == pytest.approx(found["embedding"], rel=1e-5)  # blocks start as the identity
    assert not model.embedding._forward_hooks


def test_every_rate_is_multiplied():
    one = AdamWConfig(lr=0.25, head_lr=0.5, beta1=0.5)
    assert one.with_lr(1.0) == AdamWConfig(lr=1.0, head_lr=2.0, beta1=0.5)
    two = NorMuonAdamWConfig(matrix={"lr": 0.25}, rest={"lr": 0.5, "head_lr": 0.125})
    assert two.with_lr(1.0) == NorMuonAdamWConfig(matrix={"lr": 1.0}, rest={"lr": 2.0, "head_lr": 0.5})
    result = probe_coordinates(part_config(ATTENTION), one, widths=(8, 16), rate=4.0, steps=1, **SIZES, **WHERE)
    assert result["optimizer"] == one.with_lr(1.0).model_dump(mode="json")


def test_seeds_are_averaged():
    def probe(**seeds):
        config = part_config(ATTENTION)
        return probe_coordinates(config, AdamWConfig(), widths=(8, 16), steps=1, **seeds, **SIZES, **WHERE)

    three, *each = probe(seed=1, n_seeds=3), *(probe(seed=seed) for seed in (1, 2, 3))
    for name, kinds in three["values"].items():
        for kind, series in kinds.items():
            single = torch.tensor([one["values"][name][kind] for one in each], dtype=torch.float64)
            mean = single.log().mean(0).exp()
            torch.testing.assert_close(torch.tensor(series, dtype=torch.float64), mean, rtol=1e-6, atol=0)
            assert not torch.equal(single[0], single[1])
    assert three["losses"]["mup"][0][0] == pytest.approx(sum(one["losses"]["mup"][0][0] for one in each) / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (64,)}, r"widths=\[64\] must be at least two increasing numbers"),
        ({"widths": (64, 32)}, r"widths=\[64, 32\] must be"),
        ({"widths": (15, 30)}, "width 15: .*n_heads=2 does not divide dim=15; set head_dim; give other widths"),
        ({"rate": 0.0}, "rate=0.0 must be a finite number greater than 0"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"n_seeds": 0}, "n_seeds=0 must be at least 1"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"optimizer": SGDConfig(), "steps": 1}, "train.optimizer.type=sgd: model.mup has no rule for it"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, message):
    options = {"optimizer": AdamWConfig(), "widths": (32, 64)} | SIZES | changes
    with pytest.raises(ValueError, match=message):
        probe_coordinates(part_config(ATTENTION), options.pop("optimizer"), **options, **WHERE)


def test_numbers_at_base_width_do_not_go_with_the_check():
    config = part_config(ATTENTION, extra="mup: {base_width: 16, base: {blocks.a.ffn.hidden: 24}}")
    with pytest.raises(ValueError, match="model.mup.base: the coordinate check changes model.dim alone"):
        probe_coordinates(config, AdamWConfig(), widths=(32, 64), **SIZES, **WHERE)
