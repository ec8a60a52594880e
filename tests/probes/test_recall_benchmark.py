"""benchmarks/recall.py covers every mixer at equal parameters, and runs."""

import pytest
import torch

from benchmarks import recall
from benchmarks.recall import ATTENTION_HIDDEN, BLOCKS, PATTERNS, equal_hidden, model_config
from fusedlm.config.data import DataConfig, TextSource
from fusedlm.data import prepare
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.nn.mixers import MIXERS


def test_every_mixer_is_in_the_table():
    assert set(BLOCKS) == set(MIXERS)


@pytest.mark.parametrize("name", PATTERNS)
def test_parameters_are_about_equal(name):
    def parameters(name, hidden):
        return count_parameters(build_model(model_config(name, hidden), vocab_size=192, device="meta")).total

    wanted = parameters("attention", ATTENTION_HIDDEN)
    assert parameters(name, equal_hidden(name, 192)) == pytest.approx(wanted, rel=0.005)


def test_both_probes_train_and_test_a_model(text, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("\n---\n".join([text] * 4), encoding="utf-8")

    def prepare_text(config):
        source = TextSource(path=str(tmp_path / "text.txt"), separator="---")
        split = {"type": "tail", "fraction": 0.3}
        return prepare(DataConfig(source=source, split=split, tokenizer=config.tokenizer, dir=str(tmp_path)))

    monkeypatch.setattr(recall, "prepare", prepare_text)
    settings = {"mqar_steps": 1, "mqar_lr": 1e-3, "needle_steps": 1, "needle_lr": 1e-3, "needle_samples": 1}
    cpu = torch.device("cpu"), torch.float32
    mqar = recall.run_mqar("attention", 0, settings, *cpu)
    assert [point["pairs"] for point in mqar["accuracy"]] == recall.RECALL["pairs"]
    needle = recall.run_needle("attention", 0, settings, *cpu)
    assert {cell["length"] for cell in needle["cells"]} >= {64, 128, 256}
    assert needle["parameters"] == pytest.approx(mqar["parameters"], rel=0.2)
