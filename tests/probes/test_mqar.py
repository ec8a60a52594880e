"""Multi-query associative recall: sequences, scores against known models, training."""

import numpy as np
import pytest
import torch

from fusedlm.config.model import ModelConfig
from fusedlm.model.output import Output
from fusedlm.probes import Recall, probe_mqar
from fusedlm.probes.mqar import recall_accuracy
from fusedlm.probes.training import NOT_SCORED

TASK = Recall(pairs=(1, 3, 8), n_keys=12, n_values=7)


def config(mixer: dict) -> ModelConfig:
    block = {"mixer": mixer, "ffn": {"type": "swiglu", "hidden": 32}}
    return ModelConfig.model_validate({"dim": 32, "n_layers": 2, "pattern": "a", "blocks": {"a": block}})


GDN = config({"type": "gdn", "n_heads": 2, "chunk_size": 16})


class Answers(torch.nn.Module):
    """A model whose most likely token at each position is given by a function of the sequence."""

    def __init__(self, task: Recall, answers):
        super().__init__()
        self.task, self.answers = task, answers

    def forward(self, tokens):
        ids = torch.tensor([self.answers(row) for row in tokens.tolist()])
        return Output(torch.nn.functional.one_hot(ids, self.task.vocab_size).float(), None, {}, {})


@pytest.mark.parametrize("pairs", TASK.pairs)
def test_each_queried_key_has_the_value_of_its_pair_as_target(pairs):
    tokens, targets = TASK.batch(pairs, 50, np.random.default_rng(0))
    assert tokens.shape == targets.shape == (50, 3 * pairs)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values, asked = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], row[2 * pairs :]
        assert len(set(keys)) == pairs and set(keys) == set(asked) <= set(range(TASK.n_keys))
        assert all(TASK.n_keys <= value < TASK.vocab_size for value in values)
        assert wanted[: 2 * pairs] == [NOT_SCORED] * (2 * pairs)
        assert wanted[2 * pairs :] == [values[keys.index(key)] for key in asked]


def test_queries_are_in_random_order():
    tokens, _ = TASK.batch(8, 4000, np.random.default_rng(1))
    position = (tokens[:, 0:16:2, None] == tokens[:, None, 16:]).argmax(2)  # of the query of each pair
    assert (np.bincount(position[:, 0], minlength=8) > 400).all()
    assert len(np.unique(tokens[:, 0])) == TASK.n_keys


def test_looking_up_scores_one_and_guessing_scores_the_stated_guess(cpu):
    def look_up(row):
        pairs = len(row) // 3
        values = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        return [values.get(token, 0) for token in row]

    def first_shown(row):
        return [row[1]] * len(row)

    def constant(row):
        return [TASK.n_keys] * len(row)

    def accuracy(answers):
        return recall_accuracy(Answers(TASK, answers), TASK, 8, 3000, np.random.default_rng(2), **cpu)

    assert accuracy(look_up) == 1
    assert accuracy(constant) == pytest.approx(1 / TASK.n_values, abs=0.01)
    guess = 1 / 8 + 7 / 8 / TASK.n_values
    assert accuracy(first_shown) == pytest.approx(guess, abs=0.01)
    result = probe_mqar(GDN, TASK, steps=1, batch_tokens=24, samples=2, **cpu)
    assert [point["guess"] for point in result["accuracy"]] == pytest.approx([1, 1 / 3 + 2 / 3 / 7, guess])


def test_training_learns_to_look_up(cpu):
    one_head = config({"type": "gdn", "n_heads": 1, "conv_size": 2, "chunk_size": 16})
    task = Recall(pairs=(2, 3), n_keys=6, n_values=6)
    result = probe_mqar(one_head, task, steps=80, batch_tokens=768, lr=2e-2, samples=200, **cpu)
    assert all(point["accuracy"] > 0.9 > point["guess"] for point in result["accuracy"])
    assert result["loss"] < 0.5


def test_the_seed_decides_the_result_and_the_global_generator_is_not_used(cpu):
    def run(seed):
        return probe_mqar(GDN, TASK, steps=3, batch_tokens=48, samples=40, seed=seed, **cpu)

    torch.manual_seed(5)
    first = run(0)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    assert run(0) == first
    assert run(1)["loss"] != first["loss"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pairs": ()}, "pairs=\\[\\]"),
        ({"pairs": (0,)}, "pairs=\\[0\\]"),
        ({"pairs": (4, 4)}, "pairs=\\[4, 4\\]"),
        ({"pairs": (65,)}, "pairs=65"),
        ({"n_values": 1}, "n_values=1"),
    ],
)
def test_impossible_tasks_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Recall(**settings)


@pytest.mark.parametrize("setting", [{"steps": 0}, {"batch_tokens": 0}, {"samples": 0}, {"seed": -1}, {"lr": 0.0}])
def test_values_out_of_range_are_named(setting, cpu):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        probe_mqar(GDN, TASK, **setting, **cpu)


def test_divergence_is_an_error(cpu):
    with pytest.raises(ValueError, match="learning rate"):
        probe_mqar(GDN, TASK, steps=40, batch_tokens=48, lr=1e30, **cpu)
